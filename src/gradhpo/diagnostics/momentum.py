"""How much of what a gradient does to the weights is done at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import Batch, Hyper
from gradhpo.utils._partition import merge, split
from gradhpo.utils.gradients import tree_l2_norm

__all__ = ["MOST", "at_once"]

MOST = 0.5
"""A method that sees less than this of an effect is short-sighted because of the momentum."""
LATER = 50  # steps after a gradient in which the optimizer may still act on it


def at_once(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch) -> float:
    """The share of a gradient's effect on the weights that its own step has; NaN where the inner
    optimizer is not known.

    The optimizer is run with the gradient at `inner`, again and again. After a while one of the
    gradients is disturbed, and the changes of its own update and of all later ones are added up:
    `1 - mu` for SGD with momentum mu, 1 for plain SGD.
    """
    if problem.dynamics.parts is None:
        return float("nan")
    # Not a static argument of `jit`, which would keep the problem, and its data, for good.
    return float(jax.jit(partial(_at_once, problem))(inner, lam, batch))


def _at_once(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch) -> jax.Array:
    parts = problem.dynamics.parts
    assert parts is not None
    w, rest = split(inner.params)
    optimizer = parts.make_optimizer(lam)

    def loss(w):
        weights = merge(w, rest)
        return losses.train(parts.train_loss, weights, lam, batch, inner.model_state).value

    g = jax.grad(loss)(w)

    def update(slots, disturbance):
        disturbed = jax.tree.map(lambda g: (g * (1 + disturbance)).astype(g.dtype), g)
        updates, slots = optimizer.update(disturbed, slots, w)
        return slots, updates

    slots, _ = lax.scan(update, optimizer.init(w), jnp.zeros(LATER))
    own = jnp.zeros(LATER).at[0].set(1.0)
    moved = jax.jvp(lambda d: lax.scan(update, slots, d)[1], (jnp.zeros(LATER),), (own,))[1]
    first, whole = jax.tree.map(lambda x: x[0], moved), jax.tree.map(lambda x: x.sum(0), moved)
    return tree_l2_norm(first) / tree_l2_norm(whole)
