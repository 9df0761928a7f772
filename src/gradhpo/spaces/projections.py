"""Projections that Optax lacks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gradhpo.utils.validation import check_positive, unless_traced

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

    Raises:
        ValueError: there is no such point (where the numbers are not traced).

    Source:
        Franceschi, Donini, Frasconi, Pontil (2017), section 5.1, has it as a constraint of weights.

    >>> print(budget(jnp.array([0.9, 0.8, -1.0]), total=1.0).round(2))
    [0.55 0.45 0.  ]
    """
    leaves = jax.tree.leaves(x)
    _check_feasible(sum(jnp.size(leaf) for leaf in leaves), total, lower, upper)
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


def _check_feasible(n: int, total: Any, lower: Any, upper: Any) -> None:
    if any(isinstance(bound, Tracer) for bound in (total, lower, upper)):
        return
    if not lower <= upper:
        raise ValueError(f"no number is between lower={lower} and upper={upper}.")
    if not n * lower <= total:
        raise ValueError(
            f"{n} numbers of at least lower={lower} sum to {n * lower:g}, which is above "
            f"total={total}: nothing is feasible."
        )


def simplex_rows(x: jax.Array, total: Any = 1.0) -> jax.Array:
    """The nearest point of the simplex for every row, along the last axis.

    It is `max(x - tau, 0)` with the tau at which it sums to `total`. From below, tau becomes the
    one that would be right if what is above the last tau were all that is not 0, until it is.

    Args:
        x: Rows (..., n).
        total: Sum of every row, above 0; anything else is a ValueError, if not traced.

    Cost: some ten passes over x; `optax.projections.projection_simplex` sorts it.

    Source:
        Michelot (1986), "A finite algorithm for finding the projection of a point onto the
        canonical simplex of R^n", JOTA 50.

    >>> print(simplex_rows(jnp.array([[0.5, 0.5, -2.0], [3.0, 0.0, 0.0]])))
    [[0.5 0.5 0. ]
     [1.  0.  0. ]]
    """
    unless_traced(check_positive, "total", total)
    n = x.shape[-1]

    def unfinished(state):
        _, support, before = state
        return jnp.any(support < before)

    def improve(state):
        tau, support, _ = state
        above = x > tau
        left = jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
        sums = jnp.sum(jnp.where(above, x, 0), -1, keepdims=True)
        return jnp.where(left < support, (sums - total) / left, tau), left, support

    x = x - jnp.max(x, -1, keepdims=True)  # the largest stays above tau, whatever is rounded
    tau = jnp.maximum((jnp.sum(x, -1, keepdims=True) - total) / n, -total)  # the right one is above
    support = jnp.full(tau.shape, n, jnp.int32)
    tau = lax.while_loop(unfinished, improve, (tau, support, support + 1))[0]
    return jnp.maximum(x - tau, 0)
