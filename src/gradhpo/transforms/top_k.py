"""Subset greedy: only the k hyperparameters move that promise most.

    S  = the k coordinates, or groups, of largest gain
    (lam', slots') = outer(h, slots, lam)
    lam_i, slots_i <- lam'_i, slots'_i   for i in S;   the others keep both

Gains of a coordinate, summed over a group:

    magnitude    h_i^2                       Gauss-Southwell
    scaled       h_i^2 / L_i                 Gauss-Southwell-Lipschitz: L_i how curved it is
    progress     |h_i (lam_i - lam*_i) + R_i(lam_i) - R_i(lam*_i)|
                                             what a step promises, projection included; R_i a
                                             penalty. lam* is lam' without momentum: who is not
                                             chosen keeps his, and it would hold him back for ever

Nutini, Schmidt, Laradji, Friedlander, Koepke (2015), "Coordinate Descent Converges Faster with the
Gauss-Southwell Rule Than Random Selection", ICML, equations (5) and (8) and section 8. Error
feedback: Stich, Cordonnier, Jaggi (2018), "Sparsified SGD with Memory", algorithm 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from gradhpo.core.outer import Outer, Rated, around
from gradhpo.core.types import Hyper, OptState, PyTree
from gradhpo.transforms.largest import largest
from gradhpo.utils.gradients import tree_broadcast
from gradhpo.utils.settings import check_choice, check_count
from gradhpo.utils.validation import leaves_with_names

__all__ = ["TopKState", "top_k"]


class TopKState(NamedTuple):
    """State of `top_k`."""

    outer: OptState  # slots of the update of which some coordinates are taken
    held_back: Hyper  # with error feedback, what has not been applied so far; else ()


def top_k(
    outer: Any,
    k: int | float,
    *,
    score: str | None = None,
    scale: PyTree = None,
    groups: str = "number",
    error_feedback: bool = False,
) -> Outer | Rated:
    """An outer update of which only k coordinates are taken.

    Args:
        outer: An Optax optimizer, a `gradhpo.Outer`, or None for plain steps of the run's own
            `lr_hyper`. A projection or proximal map inside of it is applied before the choice, so
            that "progress" sees it, and so is that of a task's `space=`; one around it,
            `followed_by(top_k(...), project)`, after.
        k: How many: a whole number, or a fraction in (0, 1) of all, rounded, at least one.
        score: "magnitude" or "progress". None: progress where there is a set or a penalty, in
            which a large hypergradient may lead nowhere, and would be chosen for ever; else, and
            with `scale`, magnitude.
        scale: L, a tree like the hyperparameters, or a prefix of it with numbers: gains are divided
            by it. Hyperparameters of different units are not comparable without.
        groups: What is chosen: a single "number"; a "leaf", whole arrays of the tree; a "row", what
            belongs to one index of the first axis, such as the logits of one choice.
        error_feedback: Add what was not chosen to the next hypergradient, until it is.

    Ties go to what comes first in the tree. With k of all coordinates the update is the dense one
    bit for bit. Where a set ties coordinates to each other, as a simplex or a budget does, what was
    chosen is projected once more, and this alone moves the others; momentum, old where a coordinate
    was not chosen, may then end short of the minimum: take none (of Adam `b1=0.0`). The step count
    of Adam is one for all coordinates, so its correction of the bias is that of the dense run; its
    averages are those of the steps in which a coordinate was chosen.

    Cost: a dozen passes over gains that are spread, 62 at the worst (126 for float64), no sort;
    memory of one tree of bits. By progress the update is computed twice.

    Raises:
        TypeError, ValueError: a setting is wrong; (in `apply`) the slots are not one for each
            coordinate, as those of Adafactor.

    >>> outer = top_k(optax.sgd(0.5), k=1)
    >>> lam = jnp.array([3.0, 1.0, 2.0])
    >>> print(outer.apply(jnp.array([1.0, -4.0, 2.0]), outer.init(lam), lam)[0])
    [3. 3. 2.]
    """
    k = _check_k(k)
    if score is not None:
        score = check_choice("score", score, ("magnitude", "progress"))
    groups = check_choice("groups", groups, ("number", "leaf", "row"))
    _check_scale(scale)
    if scale is not None and score == "progress":
        raise ValueError("score='progress' knows the steps, and takes no scale=.")

    def chosen_of(outer: Outer, h: Hyper, slots: OptState, lam: Hyper) -> Hyper:
        constrained = outer.settle is not None and scale is None
        if score == "progress" or (score is None and constrained):
            new = _without_momentum(outer, h, slots, lam)
            gains = jax.tree.map(lambda g, x, y: g * (x - y), h, lam, new)
            if outer.price is not None:
                gains = jax.tree.map(
                    lambda gain, r, s: gain + (r - s), gains, outer.price(lam), outer.price(new)
                )
            gains = jax.tree.map(jnp.abs, gains)
            moves = jnp.asarray(optax.tree.max(gains)) > 0  # else it only gathers: for the largest
            gains = jax.tree.map(lambda gain, g: jnp.where(moves, gain, jnp.abs(g)), gains, h)
        elif scale is None and groups == "number":
            gains = jax.tree.map(jnp.abs, h)  # ordered as squares are, which small ones have not
        else:
            gains = _squares(h, scale)
        summed = jax.tree.map(lambda x: _grouped(x, groups), gains)
        chosen = largest(summed, _count(k, _choices(lam, groups)))
        return jax.tree.map(_spread, chosen, lam)

    def wrap(outer: Outer) -> Outer:
        def init(lam: Hyper) -> TopKState:
            held_back = optax.tree.zeros_like(lam) if error_feedback else ()
            return TopKState(outer.init(lam), held_back)

        def apply(h: Hyper, slots: TopKState, lam: Hyper) -> tuple[Hyper, TopKState]:
            if error_feedback:
                h = optax.tree.add(h, slots.held_back)
            new, moved = outer.apply(h, slots.outer, lam)
            n = _choices(lam, groups)
            if _count(k, n) == n:
                return new, TopKState(moved, optax.tree.zeros_like(slots.held_back))
            chosen = chosen_of(outer, h, slots.outer, lam)
            kept = _slot_masks(outer, slots.outer, chosen)
            held_back = ()
            if error_feedback:
                held_back = jax.tree.map(lambda c, g: jnp.where(c, 0, g), chosen, h)
            slots = TopKState(jax.tree.map(jnp.where, kept, moved, slots.outer), held_back)
            some = jax.tree.map(jnp.where, chosen, new, lam)
            return some if outer.project is None else outer.project(some), slots

        return outer._replace(init=init, apply=apply, whole=outer, taken=wrap)

    return around(outer, wrap)


def _squares(h: Hyper, scale: PyTree) -> Hyper:
    """`h_i^2 / L_i` in units of the largest h, so that small ones do not vanish altogether."""
    unit = jnp.asarray(optax.tree.max(jax.tree.map(jnp.abs, h)))
    unit = jnp.where(unit > 0, unit, 1)
    squares = jax.tree.map(lambda g: (g / unit.astype(g.dtype)) ** 2, h)
    if scale is None:
        return squares
    try:
        scales = tree_broadcast(scale, h)
    except ValueError as error:
        raise ValueError(
            "scale must be a tree like the hyperparameters, or a prefix of it, but "
            f"{jax.tree.structure(scale)} is none of {jax.tree.structure(h)}."
        ) from error
    return jax.tree.map(_scaled, squares, scales)


def _grouped(gains: jax.Array, groups: str) -> jax.Array:
    """The gain of every group of a leaf, never negative."""
    axes = {"number": (), "leaf": None, "row": tuple(range(1, gains.ndim))}[groups]
    summed = jnp.sum(gains, axis=axes)
    return jnp.where(summed > 0, summed, 0)  # never -0, whose bits are large


def _spread(chosen: jax.Array, leaf: jax.Array) -> jax.Array:
    """The mask of a leaf, from that of its groups."""
    missing = jnp.ndim(leaf) - jnp.ndim(chosen)
    return jnp.broadcast_to(chosen.reshape(chosen.shape + (1,) * missing), jnp.shape(leaf))


def _slot_masks(outer: Outer, slots: OptState, chosen: Hyper) -> PyTree:
    """For every slot the mask of its coordinates; True where it belongs to none."""

    def mask(slot: jax.Array, of: jax.Array) -> jax.Array:
        if jnp.shape(slot) != of.shape:
            raise ValueError(
                f"top_k keeps the slots of the hyperparameters that it does not choose, but one "
                f"has the shape {jnp.shape(slot)} for a leaf of shape {of.shape}: take an "
                "optimizer with one slot for each number, such as optax.sgd or optax.adam."
            )
        return of

    return _map_slots(outer, mask, slots, chosen, other=lambda _: jnp.array(True))


def _without_momentum(outer: Outer, h: Hyper, slots: OptState, lam: Hyper) -> Hyper:
    """What is proposed with the slots of coordinates anew; what is one for all, such as a count of
    steps, stays. Not for a penalty, the proximal map of which takes steps that are lasting ones."""
    if outer.propose is not None:
        return outer.propose(h, slots, lam)
    own = _map_slots(outer, lambda slot: True, slots, other=lambda slot: False)
    fresh = jax.tree.map(lambda own, old, new: new if own else old, own, slots, outer.init(lam))
    return outer.apply(h, fresh, lam)[0]


def _map_slots(outer: Outer, of: Any, slots: OptState, *rest: PyTree, other: Any) -> PyTree:
    """`of(slot, ...)` at slots of a coordinate, `other(slot)` at the others."""
    return optax.tree.map_params(
        outer.init,
        lambda slot, *rest: slot if _is_masked(slot) else of(slot, *rest),
        slots,
        *rest,
        transform_non_params=other,
        is_leaf=_is_masked,
    )


def _is_masked(slot: Any) -> bool:
    return isinstance(slot, optax.MaskedNode)


def _check_k(k: Any) -> int | float:
    if isinstance(k, float):
        if not 0 < k < 1:
            raise ValueError(f"k is a number of hyperparameters, or a fraction in (0, 1); got {k}.")
        return k
    return check_count("k", k)


def _count(k: int | float, n: int) -> int:
    """How many of n are chosen."""
    if isinstance(k, float):
        return max(1, math.floor(k * n + 0.5))
    if k > n:
        raise ValueError(f"k={k} are more than the {n} that there are to choose from.")
    return k


def _choices(lam: Hyper, groups: str) -> int:
    """How many there are to choose from."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(lam)]
    of = {"number": math.prod, "leaf": lambda shape: 1, "row": lambda shape: math.prod(shape[:1])}
    return sum(map(of[groups], shapes))


def _check_scale(scale: PyTree) -> None:
    for name, x in leaves_with_names(scale):
        if not isinstance(x, Tracer) and not (jnp.asarray(x) > 0).all():
            raise ValueError(f"the scale of leaf {name} must be above 0, got {x}.")


def _scaled(square: jax.Array, scale: Any) -> jax.Array:
    try:
        fits = jnp.broadcast_shapes(jnp.shape(scale), square.shape) == square.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"scale has the shape {jnp.shape(scale)} for a leaf of shape {square.shape}: give one "
            "number for each, or one for all."
        )
    return square / jnp.asarray(scale, square.dtype)
