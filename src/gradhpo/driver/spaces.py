"""The outer update of a task with spaces: what of it fits them, and the projections in it."""

from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.core.declared import Declared
from gradhpo.core.outer import as_outer, within
from gradhpo.core.step import OuterOptimizer
from gradhpo.core.types import Hyper
from gradhpo.driver.caches import kept
from gradhpo.utils.validation import leaves_with_names

__all__ = ["within_spaces"]


def within_spaces(outer: OuterOptimizer, spaces: Declared, stored: Hyper) -> Any:
    """The outer update with the projections of the spaces.

    Args:
        stored: Hyperparameters to start from, as a state holds them.

    Raises:
        ValueError: it has a penalty or projection of its own for a leaf that is not stored in
            natural scale, or steps of different lengths where a projection ties numbers together.
    """
    if outer is not None:
        moved = _moved_leaves(outer, stored)
        _check_moves(moved, spaces, stored)
        if spaces.ties:
            _check_even(outer, moved, spaces, stored)
    return _projected(outer, spaces) if spaces.projects else outer


@kept
def _projected(outer: OuterOptimizer, spaces: Declared) -> Any:
    return within(outer, spaces.project)


def _moved_leaves(outer: OuterOptimizer, stored: Hyper) -> list[bool]:
    """For every leaf, whether a penalty or projection of the update acts on it."""
    settle = as_outer(outer, 1.0).settle
    if settle is None:
        return [False] * len(jax.tree.leaves(stored))
    points = [
        jax.tree.map(lambda x, size=size: jnp.full(jnp.shape(x), size, jnp.result_type(x)), stored)
        for size in (1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3)
    ]
    pairs = [tuple(map(jax.tree.leaves, (point, settle(point)))) for point in points]
    return [
        any(not jnp.array_equal(before[i], after[i]) for before, after in pairs)
        for i in range(len(jax.tree.leaves(stored)))
    ]


def _check_moves(moved: list[bool], spaces: Declared, stored: Hyper) -> None:
    """A map of the update sees what is stored: it must leave alone what is not in natural scale."""
    for (name, _), space, acted in zip(
        leaves_with_names(stored), spaces.spaces, moved, strict=True
    ):
        if not space.natural and acted:
            raise ValueError(
                f"leaf {name} of the hyperparameters is not stored as its value but by {space}, "
                "and the penalty or projection of outer= would act on what is stored. Leave this "
                "leaf out of it (penalty={..., key: None}), or declare a space in natural scale: "
                "interval(low, high, by='projection'), or none."
            )


UPDATES = 12  # enough to see past a rate that warms up and gradients that are added up


def _check_even(outer: OuterOptimizer, moved: list[bool], spaces: Declared, stored: Hyper) -> None:
    """Updates along a lasting hypergradient must be in proportion to it, row by row.

    Else the nearest point of the set is not where the update belongs, and the minimum is no fixed
    point of both; see `gradhpo.transforms.proximal`. It is tried at 0, where there is no decay, and
    on the whole of what `top_k` takes a part of. What is not finite there tells nothing.
    """
    whole = as_outer(outer, 1.0)
    while whole.part_of is not None:
        whole = whole.part_of[0]

    def at_zero(x):
        return jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32))

    start = jax.tree.map(at_zero, stored)
    h = jax.tree.map(lambda x: 1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 3, start)

    def distance(h):
        total, slots = start, whole.init(start)
        for _ in range(UPDATES):
            lam, slots = whole.apply(h, slots, start)
            total = jax.tree.map(jnp.add, total, lam)
        return total

    unpushed = distance(start)  # by noise
    factors = jax.tree.map(lambda x, zero, g: (x - zero) / g, distance(h), unpushed, h)
    for (name, _), space, own, each in zip(
        leaves_with_names(stored), spaces.spaces, moved, jax.tree.leaves(factors), strict=True
    ):
        if not space.ties or own or not jnp.isfinite(each).all():
            continue
        if not jnp.allclose(each, each[..., :1], rtol=1e-3, atol=0):
            raise ValueError(
                f"leaf {name} is kept by {space}, and this optimizer has a step of its own for "
                "every number, as Adam has: with a projection the two end elsewhere than at the "
                "minimum. Take transforms.proximal_adam(rate, {key: transforms.on_simplex(), ...}),"
                " or optax.sgd, or spaces.simplex(), which is a softmax."
            )
