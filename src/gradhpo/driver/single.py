"""One outer update at a time, for a loop of one's own; the window of a method that takes several
steps is one batch, repeated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.core.estimator import Estimator
from gradhpo.core.outer import check_outer_step
from gradhpo.core.problem import Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, with_metrics
from gradhpo.core.types import Batch, Hyper
from gradhpo.driver._findings import complain_of, look
from gradhpo.driver._memory import memory_explained
from gradhpo.driver._recompilation import note_shapes
from gradhpo.driver.setup import Setup, check_state, resolve
from gradhpo.utils._calls import explain_loops
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.arrays import owned
from gradhpo.utils.validation import check_batch

__all__ = ["as_rate", "hypergradient", "step"]


def step(
    setup: Setup, state: BilevelState, train_batch: Batch, val_batch: Batch, lr_hyper: Any = None
) -> BilevelState:
    """The state after one update by this batch; see `EstimatorOptimizer.step`."""
    check_outer_step(setup.name, setup.outer, lr_hyper)
    state, window = _taken(setup, state, Window(train_batch, val_batch))
    rate = as_rate(lr_hyper, scalar_dtype(state.hyperparams))
    compiled = _single(setup)
    if not compiled.metrics:
        compiled.metrics.append(_metrics(setup, state, window))
    with memory_explained(setup.name, state, setup.estimator.unroll_steps):
        return compiled.step(with_metrics(state, compiled.metrics[0]), window, rate)


def hypergradient(setup: Setup, state: BilevelState, train_batch: Batch, val_batch: Batch) -> Hyper:
    """What `step` would apply."""
    state, window = _taken(setup, state, Window(train_batch, val_batch))
    with memory_explained(setup.name, state, setup.estimator.unroll_steps):
        return _single(setup).hypergradient(state, window)


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
    hypergradient: Callable[..., Hyper]


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

    def hypergradient(state, batch):
        estimator, window = looked(state, batch)
        with explain_loops():
            return estimator.estimate(
                setup.problem, state.memory, state.inner, state.hyperparams, window
            ).hypergrad

    return _Single([], jax.jit(step), jax.jit(hypergradient))


def _repeated(setup: Setup, batch: Window) -> Window:
    check_batch("train_batch", batch.train)
    check_batch("val_batch", batch.val)
    steps = setup.estimator.unroll_steps
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, *jnp.shape(x))), batch)


def _metrics(setup: Setup, state: BilevelState, batch: Window) -> tuple[str, ...]:
    window = jax.eval_shape(lambda: _repeated(setup, batch))
    return setup.remember_shapes(look, state, window).metrics


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
