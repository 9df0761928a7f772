"""One outer update at a time, for a loop of one's own; the window of a method that takes several
steps is one batch, repeated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.core.estimator import Estimator
from gradhpo.core.outer import as_outer, check_outer_step
from gradhpo.core.problem import Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, measured, verdict, with_metrics
from gradhpo.core.types import Batch, Hyper, MetricDict
from gradhpo.driver._findings import complain_of, look
from gradhpo.driver._memory import memory_explained
from gradhpo.driver._recompilation import note_shapes
from gradhpo.driver.setup import Setup, check_state, resolve
from gradhpo.utils._calls import explain_loops
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.arrays import owned
from gradhpo.utils.validation import check_batch, explain_leaves

__all__ = ["as_rate", "hypergradient", "step"]


def step(
    setup: Setup, state: BilevelState, train_batch: Batch, val_batch: Batch, lr_hyper: Any = None
) -> BilevelState:
    """The state after one update by this batch; see `EstimatorOptimizer.step`."""
    check_outer_step(setup.name, setup.outer, lr_hyper)
    with explain_leaves(state=state, train_batch=train_batch, val_batch=val_batch):
        state, window = _taken(setup, state, Window(train_batch, val_batch))
        rate = as_rate(lr_hyper, scalar_dtype(state.hyperparams))
        state = _with_room(setup, state, window)
        with memory_explained(setup.name, state, setup.estimator.unroll_steps):
            return _single(setup).step(state, window, rate)


def hypergradient(
    setup: Setup,
    state: BilevelState,
    train_batch: Batch,
    val_batch: Batch,
    *,
    with_metadata: bool = False,
) -> Hyper | tuple[Hyper, MetricDict]:
    """What `step` would apply, and what it would say of it."""
    with explain_leaves(state=state, train_batch=train_batch, val_batch=val_batch):
        state, window = _taken(setup, state, Window(train_batch, val_batch))
        compiled = _single(setup)
        with memory_explained(setup.name, state, setup.estimator.unroll_steps):
            if not with_metadata:
                return compiled.hypergradient(state, window)[0]
            state = _with_room(setup, state, window)
            return compiled.hypergradient(state, window, with_metadata=True)


def as_rate(lr_hyper: Any, dtype: Any) -> Any:
    """One dtype whatever the user passes, so that every value is the same program."""
    if lr_hyper is None:
        return None
    if isinstance(lr_hyper, jax.Array):
        return lr_hyper if lr_hyper.dtype == dtype else lr_hyper.astype(dtype)
    return np.asarray(lr_hyper, dtype)


class _Single(NamedTuple):
    """The compiled programs."""

    metrics: list[tuple[str, ...]]  # those that the losses return, once the first call has looked
    step: Callable[..., BilevelState]
    hypergradient: Callable[..., tuple[Hyper, MetricDict]]


def _single(setup: Setup) -> _Single:
    return setup.remember("single", lambda: _programs(setup))


def _programs(setup: Setup) -> _Single:
    seen: set[Any] = set()

    def looked(state: BilevelState, batch: Window) -> tuple[Estimator, Window]:
        """The estimator and its window, after a look at the problem wherever it is traced."""
        window = _repeated(setup, batch)
        findings = setup.remember_shapes(look, state, window)
        complain_of(setup, findings)
        note_shapes(setup.name, seen, window, strict=setup.strict)
        return setup.method(resolve(setup.loop, findings.convolves).window), window

    def step(state, batch, lr_hyper):
        estimator, window = looked(state, batch)
        return bilevel_step(estimator, setup.outer)(setup.problem, state, window, lr_hyper)

    def hypergradient(state, batch, with_metadata=False):
        estimator, window = looked(state, batch)
        problem = setup.problem
        with explain_loops():
            estimate = estimator.estimate(
                problem, state.memory, state.inner, state.hyperparams, window
            )
        if not with_metadata:
            return estimate.hypergrad, {}
        outer = as_outer(setup.outer, 1.0)  # its rate is not looked at
        metrics = measured(estimator, outer, problem, state, estimate, window)
        return estimate.hypergrad, {**metrics, "status": verdict(estimator, estimate).status}

    return _Single([], jax.jit(step), jax.jit(hypergradient, static_argnames="with_metadata"))


def _repeated(setup: Setup, batch: Window) -> Window:
    check_batch("train_batch", batch.train)
    check_batch("val_batch", batch.val)
    steps = setup.estimator.unroll_steps
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, *jnp.shape(x))), batch)


def _with_room(setup: Setup, state: BilevelState, batch: Window) -> BilevelState:
    """The state with room for the metrics that the losses return."""
    known = _single(setup).metrics
    if not known:
        window = jax.eval_shape(lambda: _repeated(setup, batch))
        known.append(setup.remember_shapes(look, state, window).metrics)
    return with_metrics(state, known[0])


def _taken(setup: Setup, state: BilevelState, batch: Window) -> tuple[BilevelState, Window]:
    """Arguments of a call that nobody else writes to, the state with room for the batch."""
    check_state(state)
    batch = Window(*map(owned, batch))
    room = setup.estimator.room
    if room is not None and room.missing(state.memory):
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((state, batch.train))):
            raise ValueError(
                f"{setup.name} keeps a batch in its memory, whose shape must be known "
                "before step is traced by jit, vmap or scan: make the state by "
                "init(params, hyperparams, train_batch)."
            )
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)), jnp.result_type(x)), batch.train
        )
        state = state.update(memory=room.make(state.memory, Window(one, ())))
    return state, batch
