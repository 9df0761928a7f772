"""The meta-optimization: Adam along the exact hypergradient of a whole training run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.status import Status
from gradhpo.estimators.reversible import reversible_gradients
from gradhpo.studies.schedule.problem import Schedule, inner_optimizer, start
from gradhpo.studies.shared.reversible import Rows, problem_on_rows, whole
from gradhpo.utils.gradients import tree_where

__all__ = ["META", "meta_optimize"]

LEAST_MOMENTUM = 0.1  # of a schedule, in the geometric mean
META = {"fast": optax.adam(0.08, b2=0.99), "published": optax.adam(0.04)}


def meta_optimize(
    optimizer: optax.GradientTransformation, data: Rows, lam: Schedule, keys: jax.Array
) -> tuple[Schedule, np.ndarray, int]:
    """A meta-iteration per key: `(the schedule of the lowest loss, losses, discarded)`."""
    state = lam, optimizer.init(lam), (jnp.asarray(jnp.inf), lam)
    (_, _, (_, best)), (losses, status) = _meta_steps(optimizer, data, state, keys)
    discarded = int(np.sum(np.asarray(status) != Status.OK))
    return best, np.asarray(losses, np.float64), discarded


@functools.partial(jax.jit, static_argnums=0)
def _meta_steps(optimizer: optax.GradientTransformation, data: Rows, state: Any, keys: jax.Array):
    """Some meta-iterations; a hypergradient that is flagged changes nothing."""

    def body(state, key):
        lam, slots, best = state
        hypergrad, status, loss = _hypergradient(data, lam, key)
        best = tree_where(loss < best[0], (loss, lam), best)
        updates, new = optimizer.update(hypergrad, slots, lam)
        state = optax.apply_updates(lam, updates), new
        state = tree_where(status == Status.OK, state, (lam, slots))
        return (*state, best), (loss, status)

    return lax.scan(body, state, keys)


def _hypergradient(data: Rows, lam: Schedule, key: jax.Array):
    """`(hypergradient, status, loss)` of one training run."""
    problem = problem_on_rows(data.train, inner_optimizer)
    weights, index = start(data, lam.log_scale, len(lam.log_rate), key)
    inner, window = problem.dynamics.init(weights, lam), whole(index, data.train)
    got = reversible_gradients(problem, inner, lam, window, least_momentum=LEAST_MOMENTUM)
    found = got.gradients
    # w_0 = exp(log_scale) noise
    scale = jnp.stack([jnp.vdot(g, w) for g, w in zip(found.initial.params, weights, strict=True)])
    hypergrad = optax.tree.add(found.direct, found.indirect)
    hypergrad = hypergrad._replace(log_scale=hypergrad.log_scale + scale)
    return hypergrad, got.status, found.val_loss
