"""The outer update of a task with spaces: what of it fits them, and the projections in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.core.declared import Declared
from gradhpo.core.outer import as_outer, within
from gradhpo.core.step import OuterOptimizer
from gradhpo.core.types import Hyper
from gradhpo.driver.caches import cached
from gradhpo.utils.validation import leaves_with_names

__all__ = ["within_spaces"]


def within_spaces(outer: OuterOptimizer, spaces: Declared, stored: Hyper) -> Any:
    """The outer update with the projections of the spaces.

    Args:
        stored: Hyperparameters to start from, as a state holds them.

    Raises:
        ValueError: it has a penalty or projection of its own for a leaf that is not stored in
            natural scale; where a projection ties numbers together, it has another map for them,
            or steps of different lengths.
    """
    if outer is not None:
        maps = _maps(outer, spaces, stored)
        _check_maps(maps, spaces, stored)
        if spaces.ties:
            _check_even(outer, maps, spaces, stored)
    return _projected(outer, spaces) if spaces.projects else outer


@cached
def _projected(outer: OuterOptimizer, spaces: Declared) -> Any:
    return within(outer, spaces.project)


class _Map(NamedTuple):
    """What the penalties and projections of an update do to a leaf."""

    acts: bool
    stays: bool  # where it leads, the projection of the space changes nothing


def _maps(outer: OuterOptimizer, spaces: Declared, stored: Hyper) -> list[_Map]:
    settle, n = as_outer(outer, 1.0).settle, len(spaces.spaces)
    if settle is None:
        return [_Map(False, True)] * n
    maps = [_Map(False, True)] * n
    for size in (1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3):
        point = jax.tree.map(lambda x, size=size: size * _ramp(x), stored)
        ends = settle(point)
        three = zip(*map(jax.tree.leaves, (point, ends, spaces.project(ends))), strict=True)
        maps = [
            _Map(
                each.acts or not jnp.array_equal(before, after),
                each.stays and bool(jnp.allclose(after, inside, rtol=1e-2, atol=1e-6)),
            )
            for each, (before, after, inside) in zip(maps, three, strict=True)
        ]
    return maps


def _ramp(x: Any) -> jax.Array:
    """1, 2, 3 and again, in the shape of x."""
    return (1 + jnp.arange(jnp.size(x)) % 3).reshape(jnp.shape(x)).astype(jnp.result_type(x))


def _check_maps(maps: list[_Map], spaces: Declared, stored: Hyper) -> None:
    """A map of the update sees what is stored: it must leave alone what is not in natural scale.
    Nor can it come before a projection that ties numbers, if it is not that projection."""
    for (name, _), space, each in zip(leaves_with_names(stored), spaces.spaces, maps, strict=True):
        if not space.natural and each.acts:
            raise ValueError(
                f"leaf {name} of the hyperparameters is not stored as its value but by {space}, "
                "and the penalty or projection of outer= would act on what is stored. Leave this "
                "leaf out of it (penalty={..., key: None}), or declare a space in natural scale: "
                "interval(low, high, by='projection'), or none."
            )
        if space.ties and each.acts and not each.stays:
            raise ValueError(
                f"leaf {name} is kept by {space}, and outer= has another penalty or projection for "
                "it: one after the other they end elsewhere than at the minimum. Leave this leaf "
                "out of it (penalty={..., key: None}), or do without the space."
            )


UPDATES = 30  # enough to see past a rate that warms up and gradients that are added up


def _check_even(outer: OuterOptimizer, maps: list[_Map], spaces: Declared, stored: Hyper) -> None:
    """Updates along a lasting hypergradient must be in proportion to it, row by row.

    Else the nearest point of the set is not where the update belongs, and the minimum is no fixed
    point of both; see `gradhpo.transforms.proximal`. It is tried at 0, where there is no decay, and
    on the whole of what `top_k` takes a part of. What does not move or is not finite there tells
    nothing.
    """
    whole = as_outer(outer, 1.0)
    while whole.whole is not None:
        whole = whole.whole

    def at_zero(x):
        return jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32))

    start = jax.tree.map(at_zero, stored)
    h = jax.tree.map(_ramp, start)

    def distance(h):
        total, slots = start, whole.init(start)
        for _ in range(UPDATES):
            lam, slots = whole.apply(h, slots, start)
            total = jax.tree.map(jnp.add, total, lam)
        return total

    unpushed = distance(start)  # by noise
    factors = jax.tree.map(lambda x, zero, g: (x - zero) / g, distance(h), unpushed, h)
    for (name, _), space, own, each in zip(
        leaves_with_names(stored), spaces.spaces, maps, jax.tree.leaves(factors), strict=True
    ):
        if not space.ties or own.acts or not jnp.isfinite(each).all():
            continue
        size = jnp.abs(each)
        most = jnp.max(size, -1, keepdims=True)
        if ((size > 0) & (size < 0.999 * most)).any():
            raise ValueError(
                f"leaf {name} is kept by {space}, and this optimizer has a step of its own for "
                "every number, as Adam has: with a projection the two end elsewhere than at the "
                "minimum. Take transforms.proximal_adam(rate, {key: transforms.on_simplex(), ...}),"
                " or optax.sgd, or spaces.simplex(), which is a softmax."
            )
