"""Projections that Optax lacks.

Each is a clipping of `x - tau step` with one tau for all: that at which the sum is right. The sum
falls in tau and is linear between kinks, so Newton's method is exact once it is on the right piece.
The derivative is that of the closed form which holds while the same numbers are clipped, so that
both modes work.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gradhpo.utils.settings import check_positive, unless_traced

__all__ = ["budget", "simplex_rows"]


def budget(x: Any, total: Any, lower: Any = 0.0, upper: Any = 1.0, *, step: Any = None) -> Any:
    """The nearest point of `{lower <= z <= upper, sum z <= total}`.

    It is `clip(x - tau, lower, upper)` with the smallest tau >= 0 that keeps to the total.

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
    total, lower, upper = (jnp.asarray(bound, dtype) for bound in (total, lower, upper))
    before = _sum([jnp.clip(y, lower, upper) for y in leaves], None)
    binds = before > total
    target = jnp.where(binds, total, lax.stop_gradient(before))  # of which tau is 0
    last = _at_lower(leaves, steps, lower, None)
    near, _, tau = _threshold(None, leaves, steps, jnp.zeros_like(last), last, target, lower, upper)
    result = [
        jnp.clip(jnp.where(binds, z, y), lower, upper).astype(jnp.result_type(old))
        for z, y, old in zip(_moved(near, steps, tau), leaves, given, strict=True)
    ]
    return jax.tree.unflatten(structure, result)


def _check_feasible(n: int, total: Any, lower: Any, upper: Any) -> None:
    if any(isinstance(bound, Tracer) for bound in (total, lower, upper)):
        return
    if not -math.inf < lower <= upper:
        raise ValueError(
            f"no number is between lower={lower} and upper={upper}, or lower is infinite."
        )
    if not n * lower <= total:
        raise ValueError(
            f"{n} numbers of at least lower={lower} sum to {n * lower:g}, which is above "
            f"total={total}: nothing is feasible."
        )


def simplex_rows(x: jax.Array, total: Any = 1.0, *, step: Any = None) -> jax.Array:
    """The nearest point of the simplex for every row, along the last axis.

    It is `max(x - tau, 0)` with the tau at which it sums to `total`. Newton's method comes to it
    from below and finds in turn what is 0, as Michelot does.

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
    total, zero = jnp.asarray(total, dtype), jnp.zeros((), dtype)
    last = _at_lower([y], [each], zero, -1)
    # the right tau is above those by which one number, and all of them unclipped, have the total
    if each.ndim == 0:
        alone, mass = last - total / each, x.shape[-1] * each
    else:
        alone = jnp.max((y - total) / each, -1, keepdims=True, initial=-jnp.inf)
        mass = _sum([jnp.broadcast_to(each, x.shape)], -1)
    together = (_sum([y], -1) - total) / mass
    first = jnp.maximum(alone, jnp.where(jnp.isfinite(together), together, alone))
    near, _, tau = _threshold(-1, [y], [each], lax.stop_gradient(first), last, total, zero, None)
    return jnp.maximum(_moved(near, [each], tau)[0], 0).astype(x.dtype)


def _at_lower(leaves: list[Any], steps: list[Any], lower: Any, axis: int | None) -> jax.Array:
    """The tau at which the last number comes to its lower bound."""
    taus = [
        jnp.max((y - lower) / each, axis, keepdims=axis is not None, initial=-jnp.inf)
        for y, each in zip(leaves, steps, strict=True)
    ]
    return lax.stop_gradient(functools.reduce(jnp.maximum, taus))


def _sum(leaves: list[jax.Array], axis: int | None) -> jax.Array:
    return sum(jnp.sum(y, axis, keepdims=axis is not None) for y in leaves)  # type: ignore[return-value]


def _slope(inside: list[jax.Array], steps: list[jax.Array], axis: int | None) -> jax.Array:
    """The sum of the steps inside; of one step for all by a count, which needs no room."""
    return sum(  # type: ignore[return-value]
        each * jnp.sum(which, axis, keepdims=axis is not None, dtype=jnp.int32)
        if each.ndim == 0
        else jnp.sum(jnp.where(which, each, 0), axis, keepdims=axis is not None)
        for which, each in zip(inside, steps, strict=True)
    )


def _moved(leaves: list[jax.Array], steps: list[jax.Array], tau: jax.Array) -> list[jax.Array]:
    return [y - tau * each for y, each in zip(leaves, steps, strict=True)]


def _inside(moved: list[jax.Array], lower: Any, upper: Any) -> list[jax.Array]:
    return [z > lower if upper is None else (lower < z) & (z < upper) for z in moved]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _threshold(
    axis: int | None,
    leaves: list[jax.Array],
    steps: list[jax.Array],
    first: jax.Array,
    last: jax.Array,
    total: jax.Array,
    lower: jax.Array,
    upper: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """tau between `first` and `last` at which `sum clip(y - tau step, lower, upper)` is the total,
    as `(y - coarse step, coarse, fine)`, their sum: where one tau leaves few digits, another is
    found from there, and belongs to these numbers as they were rounded."""
    return _found(axis, leaves, steps, first, last, total, lower, upper)


@_threshold.defjvp
def _threshold_jvp(axis, primals, tangents):
    """From `sum clip(y - tau step, lower, upper) = total`."""
    _, steps, _, _, _, lower, upper = primals
    dy, dstep, _, _, dtotal, dlower, dupper = tangents
    near, coarse, fine = _threshold(axis, *primals)
    moved = _moved(near, steps, fine)
    inside = _inside(moved, lower, upper)
    bound = [dlower if upper is None else jnp.where(z > lower, dupper, dlower) for z in moved]
    dnear = _moved(dy, dstep, coarse)
    changes = [
        jnp.where(which, dz, other)
        for which, dz, other in zip(inside, _moved(dnear, dstep, fine), bound, strict=True)
    ]
    slope = _slope(inside, steps, axis)
    change = (_sum(changes, axis) - dtotal) / jnp.where(slope > 0, slope, 1)
    return (near, coarse, fine), (dnear, jnp.zeros_like(coarse), change)


@functools.partial(jax.jit, static_argnums=0)  # one program for many calls outside of others
def _found(axis, leaves, steps, first, last, total, lower, upper):
    eps = jnp.finfo(total.dtype).eps
    search = functools.partial(_search, axis, steps, total, lower, upper, 2 * eps * jnp.abs(total))
    found = search(leaves, first, first, last)
    most = 32 * jnp.abs(total)  # five bits
    lost = (jnp.abs(found.tau) * found.slope > most) | (jnp.abs(found.over) > eps * most)

    def again():
        near, tau = _moved(leaves, steps, found.tau), found.tau
        slack = 16 * eps * jnp.maximum(jnp.abs(first), jnp.abs(last))  # they are rounded, too
        low, high = first - tau - slack, last - tau + slack
        return near, tau, search(near, jnp.zeros_like(tau), low, high).tau

    def enough():
        return leaves, jnp.zeros_like(found.tau), found.tau

    return lax.cond(jnp.any(lost), again, enough)


class _Search(NamedTuple):
    tau: jax.Array
    low: jax.Array
    high: jax.Array
    over: jax.Array  # how much the sum is above the total
    slope: jax.Array  # how fast it falls
    searching: jax.Array
    steps: jax.Array


NEWTON = 20  # steps until the bracket is halved in between, without which n kinks may take n steps


def _search(
    axis: int | None,
    steps: list[jax.Array],
    total: jax.Array,
    lower: jax.Array,
    upper: jax.Array | None,
    small: jax.Array,
    leaves: list[jax.Array],
    start: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> _Search:
    """Newton's method in a bracket, and bisection where it leaves that."""

    def excess(tau):
        moved = _moved(leaves, steps, tau)
        clipped = [jnp.clip(z, lower, upper) for z in moved]
        return _sum(clipped, axis) - total, _slope(_inside(moved, lower, upper), steps, axis)

    def improve(state):
        tau, over, slope = state.tau, state.over, state.slope
        low, high = jnp.where(over > 0, tau, state.low), jnp.where(over > 0, state.high, tau)
        newton = tau + over / jnp.where(slope > 0, slope, 1)
        good = (low < newton) & (newton < high) & (slope > 0)
        good &= (state.steps < NEWTON) | (state.steps % 2 == 0)
        middle = low / 2 + high / 2
        middle = jnp.where((low < middle) & (middle < high), middle, high)
        exact = (slope > 0) & (newton == tau)  # to rounding
        searching = state.searching & ~exact
        tau = jnp.where(searching, jnp.where(good, newton, middle), tau)
        over, slope = excess(tau)
        searching &= (jnp.abs(over) > small) & (tau < high)
        return _Search(tau, low, high, over, slope, searching, state.steps + 1)

    over, slope = excess(start)
    searching = jnp.abs(over) > small
    state = _Search(start, low, high, over, slope, searching, jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda state: jnp.any(state.searching), improve, state)
