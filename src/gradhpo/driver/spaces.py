"""The outer update of a task with spaces: what of it fits them, and the projections in it."""

from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.core.declared import Declared
from gradhpo.core.outer import Outer, Rated, as_outer, within
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
    if isinstance(outer, Outer | Rated):
        _check_moves(as_outer(outer, 1.0), spaces, stored)
    elif outer is not None and spaces.ties:
        _check_even(outer, spaces, stored)
    return _projected(outer, spaces) if spaces.projects else outer


@kept
def _projected(outer: OuterOptimizer, spaces: Declared) -> Any:
    return within(outer, spaces.project)


def _check_moves(outer: Outer, spaces: Declared, stored: Hyper) -> None:
    """A map of the update sees what is stored: it must leave alone what is not in natural scale."""
    if outer.settle is None:
        return
    program = jax.make_jaxpr(outer.settle)(stored).jaxpr
    leaves = zip(
        leaves_with_names(stored), spaces.spaces, program.invars, program.outvars, strict=True
    )
    for (name, _), space, before, after in leaves:
        if not space.natural and after is not before:
            raise ValueError(
                f"leaf {name} of the hyperparameters is not stored as its value but by {space}, "
                "and the penalty or projection of outer= would act on what is stored. Leave this "
                "leaf out of it (penalty={..., key: None}), or declare a space in natural scale: "
                "interval(low, high, by='projection'), or none."
            )


def _check_even(optimizer: Any, spaces: Declared, stored: Hyper) -> None:
    """The first update must be in proportion to the hypergradient, row by row.

    Else the nearest point of the set is not where the update belongs, and the minimum is no fixed
    point of both; see `gradhpo.transforms.proximal`.
    """
    h = jax.tree.map(lambda x: 1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 3, stored)

    def update(h):
        return optimizer.update(h, optimizer.init(stored), stored)[0]

    at_zero, updates = update(jax.tree.map(jnp.zeros_like, h)), update(h)
    leaves = map(jax.tree.leaves, (h, updates, at_zero))
    for (name, _), space, *each in zip(
        leaves_with_names(stored), spaces.spaces, *leaves, strict=True
    ):
        of_h, step, decay = each
        factors = (step - decay) / of_h
        if space.ties and not jnp.allclose(factors, factors[..., :1], rtol=1e-3, atol=0):
            raise ValueError(
                f"leaf {name} is kept by {space}, and this optimizer has a step of its own for "
                "every number, as Adam has: with a projection the two end elsewhere than at the "
                "minimum. Take transforms.proximal_adam(rate, {key: transforms.on_simplex(), ...}),"
                " or optax.sgd, or spaces.simplex(), which is a softmax."
            )
