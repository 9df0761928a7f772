"""The compiled programs behind the facade.

One set per (settings, train loss, validation loss), kept in a bounded cache: equal
optimizers share their programs, and a program with the data its losses close over is
freed once it falls out, or by `clear_caches`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.algorithms._findings import Findings, complain_of, inspect, resolve
from gradhpo.algorithms._recompilation import note_shapes
from gradhpo.core import loop as loops
from gradhpo.core.dynamics import from_optax, from_update
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import fetch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.types import LossFn
from gradhpo.utils._calls import explain_loops
from gradhpo.utils.validation import check_batch

__all__ = ["Programs", "dynamics_of", "initializer", "problem_of", "programs"]

CACHED_PROGRAMS = 64


class Programs(NamedTuple):
    """Jitted functions of one facade and one pair of losses."""

    findings: list[Findings]  # of the first batch that `step` has seen
    step: Callable[..., BilevelState]
    hypergradient: Callable[..., Any]
    episode: Callable[..., BilevelState]  # donates the state
    start_episode: Callable[..., loops.Begun]
    window_step: Callable[..., BilevelState]  # donates the state
    prepare_episode: Callable[..., BilevelState]


def dynamics_of(optimizer: Any, train_loss: LossFn | None):
    """Phi from the facade's `update_fn` or `inner_optimizer`."""
    if optimizer.update_fn is not None:
        return from_update(optimizer.update_fn)
    return from_optax(train_loss, optimizer.inner_optimizer)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def initializer(optimizer: Any) -> Callable[..., BilevelState]:
    """`(params, hyperparams, window, model_state=) -> state`, jitted: helpers such as zeros compile
    as one. The losses are not known yet."""
    problem = BilevelProblem(dynamics_of(optimizer, None), None)  # type: ignore[arg-type]
    estimator = optimizer.method("scan")
    return jax.jit(functools.partial(init_state, problem, estimator, optimizer.outer_optimizer))


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def problem_of(optimizer: Any, train_loss: LossFn, val_loss: LossFn) -> BilevelProblem:
    """The problem that the facade and a pair of losses make; one object for equal ones."""
    dynamics = dynamics_of(optimizer, train_loss)
    return BilevelProblem(dynamics, val_loss, train_loss, optimizer.begin)


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def programs(optimizer: Any, train_loss: LossFn, val_loss: LossFn, loop: Loop) -> Programs:
    """The programs of `optimizer` on a pair of losses.

    Args:
        optimizer: The facade: `estimator(loop)`, `outer_optimizer`, `strict`.
        train_loss, val_loss: Static by identity.
        loop: "scan", "unroll" or "host"; "auto" only for `step` and `hypergradient`, which
            look at the problem while they are traced.
    """
    problem = problem_of(optimizer, train_loss, val_loss)
    outer = optimizer.outer_optimizer
    seen: set[Any] = set()

    def repeated(state: BilevelState, train_batch, val_batch) -> tuple[Estimator, Window]:
        """The window of `step`: one batch, repeated for methods that want several steps."""
        check_batch("train_batch", train_batch)
        check_batch("val_batch", val_batch)
        steps = optimizer.method("scan").window
        window = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, *jnp.shape(x))),
            Window(train_batch, val_batch),
        )
        findings = inspect(optimizer, problem, state, window)
        complain_of(optimizer, findings)
        note_shapes(optimizer, seen, window, strict=optimizer.strict)
        return optimizer.method(resolve(loop, findings, window=True)), window

    def step(state, train_batch, val_batch, lr_hyper):
        estimator, window = repeated(state, train_batch, val_batch)
        return bilevel_step(estimator, outer)(problem, state, window, lr_hyper)

    def hypergradient(state, train_batch, val_batch):
        estimator, window = repeated(state, train_batch, val_batch)
        with explain_loops():
            return estimator.estimate(
                problem, state.memory, state.inner, state.hyperparams, window
            ).hypergrad

    settled: Loop = "scan" if loop == "auto" else loop
    # A host loop runs over windows; inside a window the steps are unrolled.
    estimator = optimizer.method("unroll" if loop == "host" else settled)

    def episode(state, window, draw, lr_hyper, resident, keep_phi):
        return loops.run_episode(
            estimator,
            outer,
            problem,
            state,
            window,
            lr_hyper,
            draw=draw,
            resident=resident,
            keep_phi=keep_phi,
            loop=loop,
        )

    def start_episode(state, draw, keep_phi):
        return loops.start_episode(estimator, problem, state, draw, keep_phi=keep_phi)

    def window_step(state, window, lr_hyper, resident, origin):
        window = fetch(resident, window)
        return bilevel_step(estimator, outer)(problem, state, window, lr_hyper, origin)

    prepare = functools.partial(loops.prepare_episode, optimizer.method(settled), problem)
    return Programs(
        findings=[],
        step=jax.jit(step),
        hypergradient=jax.jit(hypergradient),
        episode=jax.jit(episode, static_argnames="keep_phi", donate_argnums=0),
        start_episode=jax.jit(start_episode, static_argnames="keep_phi"),
        window_step=jax.jit(window_step, donate_argnums=0),
        prepare_episode=prepare if loop == "host" else jax.jit(prepare),
    )
