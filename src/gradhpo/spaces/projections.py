"""Projections that Optax lacks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

__all__ = ["budget", "simplex_rows"]


def budget(x: Any, total: Any, lower: Any = 0.0, upper: Any = 1.0) -> Any:
    """The nearest point of `{lower <= z <= upper, sum z <= total}`.

    It is `clip(x - tau, lower, upper)` with the smallest tau >= 0 that keeps to the total. The sum
    falls in tau and is linear between kinks, so Newton's method is exact once it is on the right
    piece; where it leaves the bracket, bisection takes its place.

    Args:
        x: A tree of arrays, whose sum is that of all.
        total: Largest sum; at least the sum of the lower bounds.
        lower, upper: Numbers.

    Cost: some ten passes over x.

    Source:
        Franceschi, Donini, Frasconi, Pontil (2017), section 5.1, has it as a constraint of weights.

    >>> print(budget(jnp.array([0.9, 0.8, -1.0]), total=1.0).round(2))
    [0.55 0.45 0.  ]
    """
    leaves = jax.tree.leaves(x)
    dtype = jnp.result_type(*leaves)
    small = 2 * jnp.finfo(dtype).eps * jnp.maximum(1, jnp.abs(jnp.asarray(total, dtype)))

    def excess(tau):
        """How much the sum is above the total, and how fast it falls."""
        over = slope = jnp.zeros((), dtype)
        for leaf in leaves:
            y = leaf - tau.astype(leaf.dtype)
            over += jnp.sum(jnp.clip(y, lower, upper))
            slope += jnp.sum((y > lower) & (y < upper))
        return over - total, slope

    def unfinished(state):
        tau, low, high, over, _, count = state
        return (count < 200) & (jnp.abs(over) > small) & (low < tau) & (tau < high)

    def improve(state):
        tau, low, high, over, slope, count = state
        low, high = jnp.where(over > 0, tau, low), jnp.where(over > 0, high, tau)
        newton = tau + over / jnp.maximum(slope, 1)
        inside = (low < newton) & (newton < high) & (slope > 0)
        tau = jnp.where(inside, newton, (low + high) / 2)
        return tau, low, high, *excess(tau), count + 1

    zero = jnp.zeros((), dtype)
    over, slope = excess(zero)
    high = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves])) - lower
    high = jnp.maximum(high, 0).astype(dtype)
    first = jnp.minimum(over / jnp.maximum(slope, 1), high / 2)
    start = (first, zero - 1, high, *excess(first), jnp.zeros((), jnp.int32))
    tau = lax.while_loop(unfinished, improve, start)[0]
    tau = jnp.where(over > 0, tau, 0)
    return jax.tree.map(lambda leaf: jnp.clip(leaf - tau.astype(leaf.dtype), lower, upper), x)


def simplex_rows(x: jax.Array) -> jax.Array:
    """The nearest point of the simplex for every row, along the last axis.

    >>> print(simplex_rows(jnp.array([[0.5, 0.5, -2.0], [3.0, 0.0, 0.0]])))
    [[0.5 0.5 0. ]
     [1.  0.  0. ]]
    """
    rows = x.reshape(-1, x.shape[-1])
    return jax.vmap(optax.projections.projection_simplex)(rows).reshape(x.shape)
