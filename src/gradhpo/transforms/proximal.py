"""Proximal outer updates: penalties that have no derivative everywhere, and constraints.

For `L_val(lam) + R(lam)`, R of a closed form of

    prox_eta(x) = argmin_z R(z) + |z - x|^2 / (2 eta)

an update is `lam <- prox_eta(lam - eta h)`, and what an L1 penalty takes out is exactly 0. At a
minimum lam stays where it is only if eta is how far the optimizer goes for a lasting gradient of 1,
which is not always its rate:

    sgd                      eta
    sgd, momentum mu         eta / (1 - mu): optax.sgd adds up what it has seen
    adam                     eta / (sqrt(nu^) + eps), another one for every coordinate

A constraint is an R that is 0 in a set and infinite elsewhere, its proximal map the projection;
with Adam the one in Adam's metric: where the set ties coordinates to each other, Adam with the
nearest point in the usual sense ends elsewhere than at the minimum.

Parikh, Boyd (2014), "Proximal Algorithms", sections 1.1 and 6; for steps by coordinate Duchi,
Hazan, Singer (2011), section 5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from gradhpo.core.outer import Outer
from gradhpo.core.types import Hyper, OptState, PyTree
from gradhpo.spaces.projections import budget, simplex_rows
from gradhpo.utils.settings import check_fraction, check_not_negative, check_rate, unless_traced

__all__ = [
    "Penalty",
    "elastic_net",
    "group_lasso",
    "in_box",
    "l1",
    "nuclear",
    "on_simplex",
    "proximal_adam",
    "proximal_sgd",
    "within_budget",
]


class Penalty(NamedTuple):
    """A convex function of one array, and its proximal map; of a tree the sum over its leaves."""

    name: str
    value: Callable[[jax.Array], jax.Array]
    prox: Callable[[jax.Array, jax.Array], jax.Array]  # (x, eta): eta broadcasts to x
    price: Callable[[jax.Array], jax.Array] | None = None
    # what every number costs, the value being their sum; `prox` takes an eta for each then.
    # None: it is no such sum, and takes one eta for all
    constraint: bool = False  # 0 in a set and infinite elsewhere; `prox` leads into the set


def l1(weight: Any) -> Penalty:
    """`weight |x|_1`: soft thresholding.

    >>> print(l1(2.0).prox(jnp.array([3.0, -0.5, 1.5]), jnp.array(0.5)))
    [ 2.  -0.   0.5]
    """
    return elastic_net(weight, 0.0)._replace(name="l1")


def elastic_net(weight: Any, ridge: Any) -> Penalty:
    """`weight |x|_1 + ridge |x|_2^2 / 2`: soft thresholding, then a shrinkage."""
    weight = unless_traced(check_not_negative, "weight", weight)
    ridge = unless_traced(check_not_negative, "ridge", ridge)

    def price(x):
        return weight * jnp.abs(x) + ridge / 2 * x**2

    def prox(x, eta):
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - eta * weight, 0) / (1 + eta * ridge)

    return Penalty("elastic_net", lambda x: jnp.sum(price(x)), prox, price)


def group_lasso(weight: Any) -> Penalty:
    """`weight sum_g |x_g|_2`, a group for every index of the first axis; rows are 0 as a whole."""
    weight = unless_traced(check_not_negative, "weight", weight)

    def norms(x):
        square = jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True)
        return jnp.sqrt(jnp.where(square == 0, 1, square)) * (square != 0)

    def value(x):
        return weight * jnp.sum(norms(x))

    def prox(x, eta):
        size, cost = norms(x), eta * weight
        left = jnp.maximum(1 - cost / jnp.where(size == 0, 1, size), 0)
        return x * jnp.where(size == 0, cost == 0, left)  # squares of small numbers may vanish

    return Penalty("group_lasso", value, prox)


def nuclear(weight: Any) -> Penalty:
    """`weight` times the sum of the singular values of a matrix: of low rank in the end.

    Of more than two axes the last two are those of the matrices. Cost: a singular value
    decomposition for the update, and one for `outer_stationarity`.
    """
    weight = unless_traced(check_not_negative, "weight", weight)

    def parts(x):
        if x.ndim < 2:
            raise ValueError(f"the nuclear norm is one of matrices, not of shape {x.shape}.")
        return jnp.linalg.svd(x, full_matrices=False)

    def value(x):
        return weight * jnp.sum(parts(x)[1])

    def prox(x, eta):
        u, s, v = parts(x)
        return (u * jnp.maximum(s - eta * weight, 0)[..., None, :]) @ v

    return Penalty("nuclear", value, prox)


def in_box(lower: Any, upper: Any) -> Penalty:
    """`lower <= x <= upper`."""
    return _constraint("in_box", lambda x, eta: jnp.clip(x, lower, upper))


def on_simplex(total: Any = 1.0) -> Penalty:
    """Rows, along the last axis, of numbers that are not negative and sum to `total`."""
    return _constraint("on_simplex", lambda x, eta: simplex_rows(x, total, step=eta))


def within_budget(total: Any, lower: Any = 0.0, upper: Any = 1.0) -> Penalty:
    """`lower <= x <= upper` and `sum x <= total`, of one array."""
    return _constraint("within_budget", lambda x, eta: budget(x, total, lower, upper, step=eta))


def _constraint(name: str, project: Callable[[jax.Array, jax.Array], jax.Array]) -> Penalty:
    """What is feasible costs nothing."""
    return Penalty(name, lambda x: jnp.zeros((), x.dtype), project, jnp.zeros_like, True)


def proximal_sgd(
    rate: Any, penalty: Any, *, momentum: float | None = None, nesterov: bool = False
) -> Outer:
    """`optax.sgd` on the validation loss and a proximal step on the penalty.

    Args:
        rate: Outer rate, a number; it may be traced.
        penalty: A `Penalty`, or a prefix of the hyperparameters' tree with one, or None, at each
            leaf.
        momentum, nesterov: As in `optax.sgd`.

    >>> outer, lam = proximal_sgd(0.5, l1(1.0)), jnp.array([2.0, 0.1])
    >>> print(outer.apply(jnp.array([1.0, 0.0]), outer.init(lam), lam)[0])
    [1. 0.]
    """
    rate = unless_traced(check_rate, "rate", rate)
    mu = 0.0 if momentum is None else check_fraction("momentum", momentum)
    if mu == 1:
        raise ValueError("momentum must be below 1: it would add up all that it has seen.")

    def steps(slots, lam):
        del slots
        return jax.tree.map(lambda x: jnp.asarray(rate / (1 - mu), x.dtype), lam)

    return _proximal(optax.sgd(rate, momentum, nesterov), penalty, steps, by_coordinate=False)


def proximal_adam(
    rate: Any, penalty: Any, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Outer:
    """`optax.adam` on the validation loss, and a proximal step on the penalty that is as long for
    every coordinate as Adam's.

    Where the hypergradient has been 0 so far, this length is that for the slope of the penalty
    alone, which moves such a coordinate by `rate`; with a constraint, which has no slope, the
    longest of the leaf.

    Args:
        rate: Outer rate, a number; it may be traced.
        penalty: As in `proximal_sgd`, of those with a step for every number: `l1`, `elastic_net`,
            `in_box`, `on_simplex`, `within_budget`.
        b1, b2, eps: As in `optax.adam`.

    Raises:
        ValueError: a penalty takes one step for all numbers; b1, b2 or eps is out of range.
    """
    rate = unless_traced(check_rate, "rate", rate)
    for name, b in (("b1", b1), ("b2", b2)):
        if not isinstance(b, Tracer) and check_fraction(name, b) == 1:
            raise ValueError(f"{name} must be below 1: the average has to forget.")
    unless_traced(check_not_negative, "eps", eps)

    def steps(slots, lam):
        adam = slots[0]
        corrected = 1 - jnp.asarray(b2) ** adam.count

        def step(each, nu, x):
            alone = jnp.abs(jax.grad(lambda x: jnp.sum(each.price(x)))(x))
            seen = jnp.sqrt(jnp.where(nu > 0, nu, 1) / corrected) + eps
            least = jnp.min(seen, where=nu > 0, initial=jnp.inf)
            least = jnp.where(jnp.isfinite(least), least, 1)
            return rate / jnp.where(nu > 0, seen, jnp.where(alone > 0, alone, least))

        return _by_leaf(penalty, step, adam.nu, lam)

    return _proximal(optax.adam(rate, b1, b2, eps), penalty, steps, by_coordinate=True)


def _proximal(
    optimizer: optax.GradientTransformation,
    penalty: Any,
    steps: Callable[[OptState, Hyper], PyTree],
    *,
    by_coordinate: bool,
) -> Outer:
    """`steps(slots, lam)`: how far the optimizer goes along a lasting gradient of 1."""
    penalties = jax.tree.leaves(penalty, is_leaf=_is_penalty)
    for each in penalties:
        if not _is_penalty(each):
            raise TypeError(
                f"penalty must be a Penalty such as l1(0.1), or a tree of them, got {each!r}."
            )
        if by_coordinate and each is not None and each.price is None:
            raise ValueError(
                f"adam has another step for every coordinate, and {each.name} is no sum over "
                "coordinates: its proximal map is then none of closed form. Take proximal_sgd."
            )

    def moved(lam: Hyper, sizes: PyTree) -> Hyper:
        return _by_leaf(penalty, lambda each, x, eta: each.prox(x, eta).astype(x.dtype), lam, sizes)

    def apply(h, slots, lam):
        updates, slots = optimizer.update(h, slots, lam)
        return moved(optax.apply_updates(lam, updates), steps(slots, lam)), slots

    def propose(h, slots, lam):
        sizes = steps(slots, lam)
        return moved(jax.tree.map(lambda x, eta, g: x - eta * g, lam, sizes, h), sizes)

    def settle(lam):
        return moved(lam, jax.tree.map(lambda x: jnp.ones((), x.dtype), lam))

    def project(lam):
        sets = jax.tree.map(
            lambda each: each if each is not None and each.constraint else None,
            penalty,
            is_leaf=_is_penalty,
        )
        return _by_leaf(sets, lambda each, x: each.prox(x, jnp.ones((), x.dtype)), lam)

    def price(lam):
        def of(each, x):
            if each.price is None:
                raise ValueError(
                    f"what a step is worth is not known number by number: {each.name} is no sum "
                    "over numbers. Take score='magnitude'."
                )
            return each.price(x)

        return _by_leaf(penalty, of, lam, otherwise=jnp.zeros_like)

    constrained = any(each is not None and each.constraint for each in penalties)
    into = project if constrained else None
    return Outer(optimizer.init, apply, settle, into, price, propose)


def _by_leaf(
    penalty: Any, of: Callable[..., Any], tree: PyTree, *others: PyTree, otherwise: Any = None
) -> PyTree:
    """`of(penalty, x, ...)` at leaves that have one; the others keep x, or get `otherwise(x)`."""

    def below(each, x, *others):
        if each is None:
            return x if otherwise is None else jax.tree.map(otherwise, x)
        return jax.tree.map(lambda *leaves: of(each, *leaves), x, *others)

    return jax.tree.map(below, penalty, tree, *others, is_leaf=_is_penalty)


def _is_penalty(x: Any) -> bool:
    return x is None or isinstance(x, Penalty)
