"""Proximal outer updates: a penalty of the hyperparameters that has no derivative everywhere.

For `L_val(lam) + R(lam)`, R of a closed form of

    prox_eta(x) = argmin_z R(z) + |z - x|^2 / (2 eta)

an update is `lam <- prox_eta(lam - eta h)`, and what an L1 penalty takes out is exactly 0. At a
minimum lam stays where it is only if eta is how far the optimizer goes for a lasting gradient of 1,
which is not always its rate:

    sgd                      eta
    sgd, momentum mu         eta / (1 - mu): optax.sgd adds up what it has seen
    adam                     eta / (sqrt(nu^) + eps), another one for every coordinate

With a step for every coordinate, prox is taken coordinate by coordinate: right where R is a sum
over coordinates, and refused where it is not.

Parikh, Boyd (2014), "Proximal Algorithms", sections 1.1 and 6; for steps by coordinate Duchi,
Hazan, Singer (2011), section 5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.outer import Outer
from gradhpo.core.types import Hyper, OptState, PyTree
from gradhpo.utils.validation import check_fraction, check_not_negative, check_rate, unless_traced

__all__ = [
    "Penalty",
    "elastic_net",
    "group_lasso",
    "l1",
    "nuclear",
    "proximal_adam",
    "proximal_sgd",
]


class Penalty(NamedTuple):
    """A convex function of one array, and its proximal map; of a tree the sum over its leaves."""

    name: str
    value: Callable[[jax.Array], jax.Array]
    prox: Callable[[jax.Array, jax.Array], jax.Array]  # (x, eta): eta broadcasts to x
    separable: bool  # a sum over numbers, so that eta may differ between them


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

    def value(x):
        return jnp.sum(weight * jnp.abs(x) + ridge / 2 * x**2)

    def prox(x, eta):
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - eta * weight, 0) / (1 + eta * ridge)

    return Penalty("elastic_net", value, prox, separable=True)


def group_lasso(weight: Any) -> Penalty:
    """`weight sum_g |x_g|_2`, a group for every index of the first axis; rows are 0 as a whole."""
    weight = unless_traced(check_not_negative, "weight", weight)

    def norms(x):
        square = jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True)
        return jnp.sqrt(jnp.where(square == 0, 1, square)) * (square != 0)

    def value(x):
        return weight * jnp.sum(norms(x))

    def prox(x, eta):
        size = norms(x)
        return x * jnp.maximum(1 - eta * weight / jnp.where(size == 0, 1, size), 0)

    return Penalty("group_lasso", value, prox, separable=False)


def nuclear(weight: Any) -> Penalty:
    """`weight` times the sum of the singular values of a matrix: of low rank in the end.

    Cost: a singular value decomposition an update.
    """
    weight = unless_traced(check_not_negative, "weight", weight)

    def value(x):
        return weight * jnp.sum(jnp.linalg.svd(x, compute_uv=False))

    def prox(x, eta):
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        return (u * jnp.maximum(s - eta * weight, 0)) @ v

    return Penalty("nuclear", value, prox, separable=False)


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

    Args:
        rate: Outer rate, a number; it may be traced.
        penalty: As in `proximal_sgd`, separable: `l1`, `elastic_net`.
        b1, b2, eps: As in `optax.adam`.

    Raises:
        ValueError: a penalty is not a sum over coordinates.
    """
    rate = unless_traced(check_rate, "rate", rate)

    def steps(slots, lam):
        del lam
        adam = slots[0]
        corrected = 1 - jnp.asarray(b2) ** adam.count
        return jax.tree.map(
            lambda nu: (rate / (jnp.sqrt(nu / corrected) + eps)).astype(nu.dtype), adam.nu
        )

    return _proximal(optax.adam(rate, b1, b2, eps), penalty, steps, by_coordinate=True)


def _proximal(
    optimizer: optax.GradientTransformation,
    penalty: Any,
    steps: Callable[[OptState, Hyper], PyTree],
    *,
    by_coordinate: bool,
) -> Outer:
    """`steps(slots, lam)`: how far the optimizer goes along a lasting gradient of 1."""
    for each in jax.tree.leaves(penalty, is_leaf=_is_penalty):
        if not _is_penalty(each):
            raise TypeError(
                f"penalty must be a Penalty such as l1(0.1), or a tree of them, got {each!r}."
            )
        if by_coordinate and each is not None and not each.separable:
            raise ValueError(
                f"adam has another step for every coordinate, and {each.name} is no sum over "
                "coordinates: its proximal map is then none of closed form. Take proximal_sgd."
            )

    def moved(lam: Hyper, sizes: PyTree) -> Hyper:
        def leaf(each, lam, sizes):
            return lam if each is None else jax.tree.map(each.prox, lam, sizes)

        return jax.tree.map(leaf, penalty, lam, sizes, is_leaf=_is_penalty)

    def apply(h, slots, lam):
        updates, slots = optimizer.update(h, slots, lam)
        return moved(optax.apply_updates(lam, updates), steps(slots, lam)), slots

    def settle(lam):
        return moved(lam, jax.tree.map(lambda x: jnp.ones((), x.dtype), lam))

    return Outer(optimizer.init, apply, settle)


def _is_penalty(x: Any) -> bool:
    return x is None or isinstance(x, Penalty)
