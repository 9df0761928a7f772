"""The outer update: how hyperparameters follow their hypergradient.

    slots = init(lam),    (lam, slots) <- apply(h, slots, lam)

More general than an Optax update, which may only add to lam: a projection or a proximal step moves
lam to where it is allowed, or wanted, to be. A plain rate, any Optax optimizer and either of them
followed by such a map are instances.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.types import Hyper, OptState
from gradhpo.utils.settings import check_callable, check_rate
from gradhpo.utils.validation import check_same_avals

__all__ = [
    "Outer",
    "Rated",
    "around",
    "as_outer",
    "check_outer",
    "check_outer_step",
    "checked_apply",
    "descent",
    "followed_by",
    "from_optimizer",
    "within",
]


class Outer(NamedTuple):
    """A pair of pure functions; `apply` keeps the structure, shapes and dtypes of lam.

    Make one with `descent`, `from_optimizer` or `followed_by`, or write one. What comes after the
    pair tells of constraints and penalties, for those who make an update of another one.
    """

    init: Callable[[Hyper], OptState]  # lam -> slots
    apply: Callable[[Hyper, OptState, Hyper], tuple[Hyper, OptState]]  # (h, slots, lam)
    settle: Callable[[Hyper], Hyper] | None = None
    # P(prox(x)) of constraints and penalties at rate 1: lam is stationary where it is equal to
    # settle(lam - h), whatever h is. None: there are none, and lam is stationary where h is 0
    project: Callable[[Hyper], Hyper] | None = None
    # P alone: a point of which some coordinates are taken may be outside. None: no constraints
    price: Callable[[Hyper], Hyper] | None = None
    # the penalty of every number of lam, which together they are; None: there is no penalty
    propose: Callable[[Hyper, OptState, Hyper], Hyper] | None = None
    # (h, slots, lam) -> lam after a step of the same lengths that knows no momentum. None: what
    # `apply` proposes with the slots of a start
    whole: "Outer | None" = None  # the update of which this one takes some coordinates
    taken: "Callable[[Outer], Outer] | None" = None  # this one, made of another whole


class Rated(NamedTuple):
    """An outer update by the rate of the run, `lr_hyper`; see `around`."""

    at: Callable[[Any], Outer]  # rate -> update


def descent(rate: Any) -> Outer:
    """Plain steps `lam - rate h`; the rate may be traced.

    >>> print(descent(0.5).apply(jnp.array(2.0), (), jnp.array(3.0))[0])
    2.0
    """

    def init(lam):
        del lam
        return ()

    def apply(h, slots, lam):
        return jax.tree.map(lambda x, g: x - jnp.asarray(rate, x.dtype) * g, lam, h), slots

    return Outer(init, apply)


def from_optimizer(optimizer: optax.GradientTransformation) -> Outer:
    """The steps of an Optax optimizer.

    >>> outer, lam = from_optimizer(optax.sgd(0.5)), jnp.array(3.0)
    >>> print(outer.apply(jnp.array(2.0), outer.init(lam), lam)[0])
    2.0
    """

    def apply(h, slots, lam):
        updates, slots = optimizer.update(h, slots, lam)
        return optax.apply_updates(lam, updates), slots

    return Outer(optimizer.init, apply)


def around(outer: Any, wrap: Callable[[Outer], Outer]) -> Outer | Rated:
    """An outer update made of another one.

    Args:
        outer: An `Outer`, an Optax optimizer, or None for plain steps of the run's own `lr_hyper`.
        wrap: What is made of it.

    Raises:
        TypeError: `outer` is something else.
    """
    if outer is None:
        return Rated(lambda rate: wrap(descent(rate)))
    if isinstance(outer, Rated):
        return Rated(lambda rate: wrap(outer.at(rate)))
    check_outer("outer", outer)
    return wrap(as_outer(outer))


def followed_by(outer: Any, move: Callable[[Hyper], Hyper]) -> Outer | Rated:
    """An outer update, then `move(lam)`, a projection onto where lam may be.

    Args:
        outer: An `Outer`, an Optax optimizer, or None for plain steps of the run's own `lr_hyper`.
        move: A projection, a map of lam to a tree of the same shapes that changes nothing when it
            is applied again, such as `optax.projections.projection_non_negative`;
            `outer_stationarity` in the metrics is measured by it. For a penalty see
            `gradhpo.transforms.proximal_sgd`.

    Raises:
        TypeError: `outer` or `move` is something else.

    >>> outer = followed_by(optax.sgd(0.5), optax.projections.projection_non_negative)
    >>> lam = jnp.array([3.0, 0.5])
    >>> print(outer.apply(jnp.array([2.0, 2.0]), outer.init(lam), lam)[0])
    [2. 0.]
    """
    check_callable("move", move, "hyperparams -> hyperparams")

    def wrap(outer: Outer) -> Outer:
        def apply(h, slots, lam):
            lam, slots = outer.apply(h, slots, lam)
            return move(lam), slots

        def settle(lam):
            return move(lam if outer.settle is None else outer.settle(lam))

        def project(lam):
            return move(lam if outer.project is None else outer.project(lam))

        def propose(h, slots, lam):
            return move(outer.propose(h, slots, lam))  # type: ignore[misc]

        known = None if outer.propose is None else propose
        return Outer(outer.init, apply, settle, project, outer.price, known, outer.whole)

    return around(outer, wrap)


def within(outer: Any, project: Callable[[Hyper], Hyper]) -> Outer | Rated:
    """An outer update that stays where a projection leads, as `followed_by`; an update that
    chooses among the coordinates of a step sees it."""

    def wrap(outer: Outer) -> Outer:
        if outer.whole is None or outer.taken is None:
            return as_outer(followed_by(outer, project))
        return outer.taken(wrap(outer.whole))

    return around(outer, wrap)


def as_outer(outer: Any, lr_hyper: Any = None) -> Outer:
    """The outer update that a user means: an `Outer`, an Optax optimizer, or a plain rate."""
    if outer is None:
        return descent(lr_hyper)
    if isinstance(outer, Rated):
        return outer.at(lr_hyper)
    return outer if isinstance(outer, Outer) else from_optimizer(outer)


def check_outer(name: str, outer: Any) -> None:
    """An `Outer`, or what Optax makes.

    Raises:
        TypeError: something else, such as `optax.adam` without a call.
    """
    optimizer = hasattr(outer, "init") and hasattr(outer, "update") and not isinstance(outer, type)
    if not (optimizer or isinstance(outer, Outer | Rated)):
        raise TypeError(
            f"{name} must be an Optax GradientTransformation, such as optax.adam(0.01), or a "
            f"gradhpo.Outer, got {outer!r}."
        )


def check_outer_step(who: str, outer_optimizer: Any, lr_hyper: Any) -> None:
    """Hyperparameters are moved by an optimizer or by plain steps of a rate: exactly one."""
    by_rate = outer_optimizer is None or isinstance(outer_optimizer, Rated)
    if (lr_hyper is None) == by_rate:
        given = "neither" if lr_hyper is None else "both"
        outer = "outer=" if who == "tune" else "outer_optimizer= (given when it is made)"
        raise ValueError(
            f"{who} moves the hyperparameters by {outer} or by plain steps of lr_hyper= (given to "
            f"every call), but got {given}."
        )
    if lr_hyper is not None:
        check_rate("lr_hyper", lr_hyper)


def checked_apply(outer: Outer, h: Hyper, slots: OptState, lam: Hyper) -> tuple[Hyper, OptState]:
    """`outer.apply`, refused where lam or the slots come back in other shapes or dtypes.

    Raises:
        TypeError: (when traced) it returns something else than a pair.
        ValueError: (when traced) the leaf that changed.
    """
    got = outer.apply(h, slots, lam)
    if not (isinstance(got, tuple) and len(got) == 2):
        raise TypeError(
            "apply(hypergradient, slots, hyperparams) of the outer update must return "
            f"(hyperparams, slots), but returned {type(got).__name__}."
        )
    for what, old, new in (("hyperparameters", lam, got[0]), ("slots", slots, got[1])):
        check_same_avals(
            *jax.eval_shape(lambda old=old, new=new: (old, new)),
            rule=f"the outer update must keep the shapes and dtypes of the {what}",
            remedy="A rate, a bound or a constant of another shape or a wider dtype does that; "
            "cast it, or give one number.",
        )
    return got
