"""The compiled programs behind the facade.

One set per (settings, train loss, validation loss), kept in a bounded cache: equal
optimizers share their programs, and a program with the data its losses close over is
freed once it falls out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.core import loop as loops
from gradhpo.core.dynamics import from_optax, from_update
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.inspect import (
    check_problem,
    has_convolution,
    ignored_hyperparams,
    untrained_params,
)
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.types import LossFn
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import complain

__all__ = [
    "Findings",
    "Programs",
    "complain_of",
    "dynamics_of",
    "initializer",
    "inspect",
    "note_compilation",
    "problem_of",
    "programs",
    "resolve",
]

CACHED_PROGRAMS = 64
MANY_COMPILATIONS = 4


class Findings(NamedTuple):
    """What a look at the problem's jaxpr says; see `complain_of`."""

    ignored: list[str]
    untrained: list[str]
    convolves: bool
    remarks: tuple[str, ...]


class Programs(NamedTuple):
    """Jitted functions of one facade and one pair of losses."""

    step: Callable[..., BilevelState]
    hypergradient: Callable[..., Any]
    episode: Callable[..., BilevelState]  # donates the state
    start_episode: Callable[..., BilevelState]
    window_step: Callable[..., BilevelState]  # donates the state
    estimate_theta: Callable[..., BilevelState]


def dynamics_of(optimizer: Any, train_loss: LossFn | None):
    """Phi from the facade's `update_fn` or `inner_optimizer`."""
    if optimizer.update_fn is not None:
        return from_update(optimizer.update_fn)
    return from_optax(train_loss, optimizer.inner_optimizer)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def initializer(optimizer: Any) -> Callable[..., BilevelState]:
    """`(params, hyperparams, window) -> state`, jitted: helpers such as zeros compile as one."""
    problem = BilevelProblem(dynamics_of(optimizer, None), _unused)
    estimator = optimizer.estimator("scan")
    return jax.jit(functools.partial(init_state, problem, estimator, optimizer.outer_optimizer))


def _unused(params, hyperparams, batch):
    raise NotImplementedError("init evaluates no loss")


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def problem_of(optimizer: Any, train_loss: LossFn, val_loss: LossFn) -> BilevelProblem:
    """The problem that the facade and a pair of losses make; one object for equal ones."""
    return BilevelProblem(dynamics_of(optimizer, train_loss), val_loss, train_loss)


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
        steps = optimizer.estimator("scan").window
        window = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, *jnp.shape(x))),
            Window(train_batch, val_batch),
        )
        findings = look(optimizer, problem, state, window)
        complain_of(optimizer, findings)
        _note_shapes(optimizer, seen, window)
        return optimizer.estimator(resolve(loop, findings, window=True)), window

    def step(state, train_batch, val_batch, lr_hyper):
        estimator, window = repeated(state, train_batch, val_batch)
        return bilevel_step(estimator, outer)(problem, state, window, lr_hyper)

    def hypergradient(state, train_batch, val_batch):
        estimator, window = repeated(state, train_batch, val_batch)
        return estimator.estimate(
            problem, state.memory, state.inner, state.hyperparams, window
        ).hypergrad

    settled: Loop = "scan" if loop == "auto" else loop
    # A host loop runs over windows; inside a window the steps are unrolled.
    estimator = optimizer.estimator("unroll" if loop == "host" else settled)

    def episode(state, window, lr_hyper, resident, keep_phi):
        return loops.run_episode(
            estimator,
            outer,
            problem,
            state,
            window,
            lr_hyper,
            resident=resident,
            keep_phi=keep_phi,
            loop=loop,
        )

    def start_episode(state, keep_phi):
        return loops.start_episode(estimator, problem.dynamics, state, keep_phi=keep_phi)

    def window_step(state, window, lr_hyper, resident):
        window = loops.fetch(resident, window)
        return bilevel_step(estimator, outer)(problem, state, window, lr_hyper)

    fit = functools.partial(loops.estimate_theta, optimizer.estimator(settled), problem)
    return Programs(
        step=jax.jit(step),
        hypergradient=jax.jit(hypergradient),
        episode=jax.jit(episode, static_argnames="keep_phi", donate_argnums=0),
        start_episode=jax.jit(start_episode, static_argnames="keep_phi"),
        window_step=jax.jit(window_step, donate_argnums=0),
        estimate_theta=fit if loop == "host" else jax.jit(fit),
    )


def look(optimizer: Any, problem: BilevelProblem, state: BilevelState, window: Window) -> Findings:
    """Check a problem at its first call and see what it ignores.

    Args:
        state, window: Arrays, tracers or their shapes; nothing is computed.
    """
    lam, inner = state.hyperparams, state.inner
    estimator = optimizer.estimator("scan")
    fresh = jax.eval_shape(estimator.init, inner, lam, window)
    if type(fresh) is not type(state.memory):
        raise ValueError(
            f"this state was made by another method: its memory is {type(state.memory).__name__}, "
            f"{type(optimizer).__name__} needs {type(fresh).__name__}. Make it by the init of the "
            "optimizer that uses it."
        )
    check_problem(problem, inner, lam, window)
    batch = jax.eval_shape(tree_last, window)
    return Findings(
        ignored_hyperparams(problem, inner, lam, batch, estimator.indirect),
        untrained_params(problem, inner, lam, batch.train),
        has_convolution(problem, inner, lam, batch.train),
        optimizer.remarks(batch.train),
    )


def inspect(optimizer: Any, problem: BilevelProblem, state: BilevelState, window: Window):
    """`look`, remembered by shapes, so that a second `run` traces nothing."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: (state, window)))
    return _inspect(optimizer, problem, structure, tuple(leaves))


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def _inspect(optimizer, problem, structure, leaves) -> Findings:
    state, window = jax.tree.unflatten(structure, leaves)
    return look(optimizer, problem, state, window)


def resolve(loop: Loop | str, findings: Findings, *, window: bool = False) -> Loop:
    """What "auto" means here: on CPU a convolution must stay out of compiled loops."""
    if loop != "auto":
        return "unroll" if window and loop == "host" else loop
    if findings.convolves and jax.default_backend() == "cpu":
        return "unroll" if window else "host"
    return "scan"


def complain_of(optimizer: Any, findings: Findings) -> None:
    """Warn of hyperparameters without effect and parameters without training (or raise)."""
    name = type(optimizer).__name__
    if findings.ignored:
        reach = (
            "the training step or the validation loss"
            if optimizer.estimator("scan").indirect
            else "the validation loss, and a first-order method sees nothing else"
        )
        complain(
            f"{name}: the hypergradient of leaf {', '.join(findings.ignored)} is identically zero, "
            f"because it does not enter {reach}. It will never move. Is it closed over instead of "
            "passed in, behind a stop_gradient, or is this the wrong method for it?",
            optimizer.strict,
        )
    if findings.untrained:
        complain(
            f"{name}: train_loss_fn has no gradient path to params leaf "
            f"{', '.join(findings.untrained)} (stop_gradient, argmax, a cast to integers?); it is "
            "not trained by this loss.",
            optimizer.strict,
        )
    for remark in findings.remarks:
        complain(f"{name}: {remark}", optimizer.strict)


_compilations: dict[Any, list[tuple[int, ...]]] = {}


def note_compilation(optimizer: Any, train_loss: LossFn, val_loss: LossFn, compiled: bool) -> None:
    """Warn when call after call of `step` brings its functions as new objects.

    Counted are compilations in a row: a call that finds its program starts the count anew, so
    several problems made by one piece of code do not add up.
    """
    named = {
        "update_fn": optimizer.update_fn,
        "inner_optimizer": optimizer.inner_optimizer,
        "outer_optimizer": optimizer.outer_optimizer,
        "train_loss_fn": train_loss,
        "val_loss_fn": val_loss,
    }
    key = (type(optimizer), *(_source(f) for f in named.values()))
    if not compiled:
        _compilations.pop(key, None)
        return
    known = _compilations.setdefault(key, [])
    known.append(tuple(id(f) for f in named.values()))
    if len(known) == MANY_COMPILATIONS:
        changing = [
            name
            for name, values in zip(named, zip(*known, strict=True), strict=True)
            if len(set(values)) == MANY_COMPILATIONS
        ]
        if changing:
            complain(
                f"{type(optimizer).__name__} has been compiled {MANY_COMPILATIONS} times, because "
                f"{' and '.join(changing)} is a new object every time. Functions are known by "
                "identity: define it once, outside the loop, and pass the same object.",
                optimizer.strict,
            )


def _source(function: Any) -> Any:
    update = getattr(function, "update", function)  # an Optax transformation
    update = getattr(update, "func", update)  # functools.partial
    return getattr(update, "__code__", type(update))


def _note_shapes(optimizer: Any, seen: set[Any], window: Window) -> None:
    """Warn once when `step` keeps being compiled for new batch shapes."""
    shapes = tuple(f"{x.dtype}{list(x.shape[1:])}" for x in jax.tree.leaves(window))
    if shapes in seen:
        return
    seen.add(shapes)
    if len(seen) == MANY_COMPILATIONS:
        complain(
            f"{type(optimizer).__name__}.step has been compiled {MANY_COMPILATIONS} times; the "
            f"batch shapes were {sorted(seen)}. Keep shapes and dtypes fixed: drop or pad the last "
            "partial batch.",
            optimizer.strict,
        )
