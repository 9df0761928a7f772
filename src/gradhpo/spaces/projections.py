"""Projections that Optax lacks.

Each is a clipping of `x - tau step` with one tau for all, found by a loop. Its derivative is that
of the closed form which holds while the same numbers are clipped, so that both modes work.
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
    steps = [1] * len(given) if step is None else structure.flatten_up_to(step)
    leaves, steps = ([jnp.asarray(each, dtype) for each in tree] for tree in (given, steps))
    bounds = [jnp.asarray(bound, dtype) for bound in (total, lower, upper)]
    # tau is counted from where all is at the lower bound: large numbers keep their differences
    most = lax.stop_gradient(_largest_place(leaves, steps, lower))
    tau = _spent(leaves, steps, most, *bounds)
    binds = sum(jnp.sum(jnp.clip(leaf, lower, upper)) for leaf in leaves) > total
    result = [
        jnp.clip(jnp.where(binds, (y - most * each) - tau * each, y), lower, upper).astype(
            jnp.result_type(old)
        )
        for y, each, old in zip(leaves, steps, given, strict=True)
    ]
    return jax.tree.unflatten(structure, result)


def _largest_place(leaves: list[Any], steps: list[Any], lower: Any) -> jax.Array:
    """The tau at which the last number comes to its lower bound; at least 0."""
    pairs = zip(leaves, steps, strict=True)
    return jnp.stack([jnp.max((y - lower) / each, initial=0) for y, each in pairs]).max()


@jax.custom_jvp
def _spent(
    leaves: list[Any], steps: list[Any], most: Any, total: Any, lower: Any, upper: Any
) -> jax.Array:
    """`tau - most` at which the sum is the total; anything if it is below at tau = 0."""
    pairs = list(zip(leaves, steps, strict=True))
    small = 2 * jnp.finfo(total.dtype).eps * jnp.maximum(1, jnp.abs(total))

    def excess(tau):
        """How much the sum is above the total, and how fast it falls."""
        moved = [((y - most * each) - tau * each, each) for y, each in pairs]
        over = sum(jnp.sum(jnp.clip(y, lower, upper)) for y, _ in moved) - total
        return over, sum(_sum_where((y > lower) & (y < upper), each) for y, each in moved)

    def unfinished(state):
        tau, low, high, over, _, count = state
        return (count < 200) & (jnp.abs(over) > small) & (low < tau) & (tau < high)

    def improve(state):
        tau, low, high, over, slope, count = state
        low, high = jnp.where(over > 0, tau, low), jnp.where(over > 0, high, tau)
        newton = tau + over / jnp.where(slope > 0, slope, 1)
        good = (low < newton) & (newton < high) & (slope > 0)
        tau = jnp.where(good, newton, (low + high) / 2)
        return tau, low, high, *excess(tau), count + 1

    over, slope = excess(-most)
    # nothing to look for where the sum is below the total: the bracket is empty then
    low = jnp.where(over > 0, -2 * most - 1, -most)
    start = (-most, low, jnp.zeros_like(most), over, slope, jnp.zeros((), jnp.int32))
    tau, _, high, over, _, _ = lax.while_loop(unfinished, improve, start)
    return jnp.where(over > small, high, tau)


@_spent.defjvp
def _spent_jvp(primals, tangents):
    """From `sum clip(y - (tau + most) step) = total`."""
    leaves, steps, most, total, lower, upper = primals
    dy, dstep, _, change, dlower, dupper = tangents
    tau = _spent(*primals)
    change, slope = -change, 0
    for y, each, dy_, dstep_ in zip(leaves, steps, dy, dstep, strict=True):
        z = (y - most * each) - tau * each
        moved = jnp.where(z < upper, dy_ - (tau + most) * dstep_, dupper)
        change += jnp.sum(jnp.where(z > lower, moved, dlower))
        slope += _sum_where((z > lower) & (z < upper), each)
    return tau, change / jnp.where(slope > 0, slope, 1)


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
    highest = lax.stop_gradient(jnp.max(y / each, -1, keepdims=True))
    y = y - highest * each  # the largest stays above tau, whatever is rounded
    tau = _row_thresholds(y, each, jnp.asarray(total, dtype))
    return jnp.maximum(y - tau * each, 0).astype(x.dtype)


def _row_sums(y: jax.Array, each: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of y and of the steps."""
    return jnp.sum(jnp.where(where, y, 0), -1, keepdims=True), _sum_where(where, each, -1)


def _sum_where(where: jax.Array, each: jax.Array, axis: int | None = None) -> jax.Array:
    """Of steps; where there is one for all, by a count, which needs no room."""
    keep = axis is not None
    if each.ndim == 0:
        return each * jnp.sum(where, axis, keepdims=keep, dtype=jnp.int32)
    return jnp.sum(jnp.where(where, each, 0), axis, keepdims=keep)


@jax.custom_jvp
def _row_thresholds(y: jax.Array, each: jax.Array, total: jax.Array) -> jax.Array:
    """tau of every row, the largest number of which is 0."""

    def unfinished(state):
        _, support, before = state
        return jnp.any(support < before)

    def improve(state):
        tau, support, _ = state
        above = y > tau * each
        count = jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
        of_y, mass = _row_sums(y, each, above)
        return jnp.where(count < support, (of_y - total) / mass, tau), count, support

    of_y, mass = _row_sums(y, each, jnp.ones(y.shape, bool))
    highest = each if each.ndim == 0 else jnp.max(jnp.where(y == 0, each, 0), -1, keepdims=True)
    tau = jnp.maximum((of_y - total) / mass, -total / highest)  # the right one is above both
    support = jnp.full(tau.shape, y.shape[-1], jnp.int32)
    return lax.while_loop(unfinished, improve, (tau, support, support + 1))[0]


@_row_thresholds.defjvp
def _row_thresholds_jvp(primals, tangents):
    """From `sum max(y - tau step, 0) = total`."""
    y, each, _ = primals
    dy, dstep, dtotal = tangents
    tau = _row_thresholds(*primals)
    change, mass = _row_sums(dy - tau * dstep, each, y > tau * each)
    return tau, (change - dtotal) / mass
