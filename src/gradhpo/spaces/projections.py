"""Projections that Optax lacks.

What is differentiated is the closed form on the final piece, so that both modes work: the loop that
finds the piece is left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gradhpo.utils.validation import check_positive, unless_traced

__all__ = ["budget", "simplex_rows"]


def budget(x: Any, total: Any, lower: Any = 0.0, upper: Any = 1.0, *, step: Any = None) -> Any:
    """The nearest point of `{lower <= z <= upper, sum z <= total}`.

    It is `clip(x - tau, lower, upper)` with the smallest tau >= 0 that keeps to the total. The sum
    falls in tau and is linear between kinks, so Newton's method is exact once it is on the right
    piece; where it leaves the bracket, bisection takes its place.

    Args:
        x: A tree of arrays, whose sum is that of all.
        total: Largest sum; at least the sum of the lower bounds.
        lower, upper: Numbers.
        step: A tree like x, numbers above 0: the point is nearest by `sum (z - x)^2 / step`, as a
            proximal step with steps of these lengths needs it. None: 1.

    Cost: some ten passes over x. Sums are of float32 at least.

    Raises:
        ValueError: there is no such point (where the numbers are not traced).

    Source:
        Franceschi, Donini, Frasconi, Pontil (2017), section 5.1, has it as a constraint of weights.

    >>> print(budget(jnp.array([0.9, 0.8, -1.0]), total=1.0).round(2))
    [0.55 0.45 0.  ]
    """
    given, structure = jax.tree.flatten(x)
    _check_feasible(sum(jnp.size(leaf) for leaf in given), total, lower, upper)
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    small = 2 * jnp.finfo(dtype).eps * jnp.maximum(1, jnp.abs(jnp.asarray(total, dtype)))
    leaves = [jnp.asarray(leaf, dtype) for leaf in given]
    if step is None:
        steps = [jnp.ones((), dtype) for _ in leaves]
    else:
        steps = [jnp.asarray(each, dtype) for each in structure.flatten_up_to(step)]
    pairs = list(zip(leaves, steps, strict=True))

    def cut(y):
        return jnp.clip(y, lower, upper)

    # tau is counted from where all is at the lower bound: large numbers keep their differences
    most = jnp.stack([jnp.max((y - lower) / each, initial=0) for y, each in pairs]).max()
    most = lax.stop_gradient(most)
    pairs = [(y - most * each, each) for y, each in pairs]
    fixed = lax.stop_gradient(pairs)

    def inside(y):
        return (y > lower) & (y < upper)

    def excess(tau):
        """How much the sum is above the total, and how fast it falls."""
        moved = [(y - tau * each, each) for y, each in fixed]
        over = sum(jnp.sum(cut(y)) for y, _ in moved) - total
        return over, sum(jnp.sum(jnp.where(inside(y), each, 0)) for y, each in moved)

    def unfinished(state):
        tau, low, high, over, _, count = state
        return binds & (count < 200) & (jnp.abs(over) > small) & (low < tau) & (tau < high)

    def improve(state):
        tau, low, high, over, slope, count = state
        low, high = jnp.where(over > 0, tau, low), jnp.where(over > 0, high, tau)
        newton = tau + over / jnp.where(slope > 0, slope, 1)
        good = (low < newton) & (newton < high) & (slope > 0)
        tau = jnp.where(good, newton, (low + high) / 2)
        return tau, low, high, *excess(tau), count + 1

    binds = sum(jnp.sum(cut(lax.stop_gradient(leaf))) for leaf in leaves) > total
    zero = jnp.zeros((), dtype)
    start = (-most, -2 * most - 1, zero, *excess(-most), jnp.zeros((), jnp.int32))
    tau, _, high, over, _, _ = lax.while_loop(unfinished, improve, start)
    tau = jnp.where(over > small, high, tau)

    # with its derivative, from what is inside: (sum y - sum z) / sum of the steps
    moving = [inside(y - tau * each) for y, each in fixed]
    of_all = zip(pairs, moving, strict=True)
    left = sum(jnp.sum(jnp.where(where, y, 0)) for (y, _), where in of_all)
    of_all = zip(fixed, moving, strict=True)
    slope = sum(jnp.sum(jnp.where(where, each, 0)) for (_, each), where in of_all)
    tau = tau + (left - lax.stop_gradient(left)) / jnp.where(slope > 0, slope, 1)

    result = [
        jnp.where(binds, cut(y - tau * each), cut(leaf)).astype(jnp.result_type(old))
        for (y, each), leaf, old in zip(pairs, leaves, given, strict=True)
    ]
    return jax.tree.unflatten(structure, result)


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


def simplex_rows(x: jax.Array, total: Any = 1.0, *, step: Any = None) -> jax.Array:
    """The nearest point of the simplex for every row, along the last axis.

    It is `max(x - tau, 0)` with the tau at which it sums to `total`. From below, tau becomes the
    one that would be right if what is above the last tau were all that is not 0, until it is.

    Args:
        x: Rows (..., n).
        total: Sum of every row, above 0; anything else is a ValueError, if not traced.
        step: As in `budget`.

    Cost: some ten passes over x; `optax.projections.projection_simplex` sorts it. Sums are of
    float32 at least.

    Source:
        Michelot (1986), "A finite algorithm for finding the projection of a point onto the
        canonical simplex of R^n", JOTA 50.

    >>> print(simplex_rows(jnp.array([[0.5, 0.5, -2.0], [3.0, 0.0, 0.0]])))
    [[0.5 0.5 0. ]
     [1.  0.  0. ]]
    """
    unless_traced(check_positive, "total", total)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y, each = x.astype(dtype), jnp.asarray(1 if step is None else step, dtype)
    places = y / each
    highest = lax.stop_gradient(jnp.max(places, -1, keepdims=True))
    y = y - highest * each  # the largest stays above tau, whatever is rounded
    fixed = lax.stop_gradient(y)

    def sums(tau, y):
        """Of what is above tau: how many, y, and the steps."""
        above = fixed > tau * each
        count = jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
        mass = count if step is None else jnp.sum(jnp.where(above, each, 0), -1, keepdims=True)
        return count, jnp.sum(jnp.where(above, y, 0), -1, keepdims=True), mass

    def unfinished(state):
        _, support, before = state
        return jnp.any(support < before)

    def improve(state):
        tau, support, _ = state
        count, of_y, mass = sums(tau, fixed)
        return jnp.where(count < support, (of_y - total) / mass, tau), count, support

    n, all_of = x.shape[-1], jnp.sum(jnp.broadcast_to(each, x.shape), -1, keepdims=True)
    widest = jnp.max(jnp.where(places == highest, each, 0), -1, keepdims=True)
    # the right one is above both
    tau = jnp.maximum((jnp.sum(fixed, -1, keepdims=True) - total) / all_of, -total / widest)
    support = jnp.full(tau.shape, n, jnp.int32)
    tau = lax.while_loop(unfinished, improve, (tau, support, support + 1))[0]
    _, of_y, mass = sums(tau, y)  # and its derivative
    tau = tau + (of_y - lax.stop_gradient(of_y)) / mass
    return jnp.maximum(y - tau * each, 0).astype(x.dtype)
