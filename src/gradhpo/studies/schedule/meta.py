"""The meta-optimization: Adam along the exact hypergradient of a whole training run."""

import functools

import jax
import numpy as np
import optax

from gradhpo.studies.schedule.problem import Schedule, problem_of
from gradhpo.studies.shared.reversible import Rows, learn

__all__ = ["META", "meta_optimize"]

LEAST_MOMENTUM = 0.1  # of a schedule, in the geometric mean
META = {"fast": optax.adam(0.08, b2=0.99), "published": optax.adam(0.04)}


def meta_optimize(
    optimizer: optax.GradientTransformation, data: Rows, lam: Schedule, keys: jax.Array
) -> tuple[Schedule, np.ndarray, int]:
    """A meta-iteration per key: `(the schedule of the lowest loss, losses, discarded)`."""
    losses, after, discarded = _meta_steps(optimizer, data, lam, keys)
    losses = np.asarray(losses, np.float64)
    best = int(np.nanargmin(losses))
    if best:  # the run of meta-iteration m is by the schedule after m - 1
        lam = jax.tree.map(lambda x: x[best - 1], after)
    return lam, losses, int(discarded)


@functools.partial(jax.jit, static_argnums=0)
def _meta_steps(
    optimizer: optax.GradientTransformation, data: Rows, lam: Schedule, keys: jax.Array
):
    """`(losses, schedules after every meta-iteration, discarded hypergradients)`."""
    observe = lambda state: (state.metadata["val_loss"], state.hyperparams)  # noqa: E731
    problem = problem_of(data, len(lam.log_rate))
    state, (losses, after) = learn(problem, lam, keys, optimizer, observe, LEAST_MOMENTUM)
    return losses, after, state.metadata["n_rejected"]
