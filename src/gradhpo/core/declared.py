"""Hyperparameters with a space at every leaf, and a problem that sees their values.

Every method works on what is stored: the problem is bound to the spaces, so that its dynamics,
losses and start get values, and derivatives go through the maps like through any other function.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.dynamics import Dynamics, Parts
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import Hyper, PyTree
from gradhpo.spaces.space import Space, unconstrained
from gradhpo.utils.gradients import tree_broadcast
from gradhpo.utils.validation import leaves_with_names

__all__ = ["Declared", "bind", "declared"]


class Declared(NamedTuple):
    """A space for every leaf of the hyperparameters; hashable, equal declarations are equal."""

    structure: Any
    spaces: tuple[Space, ...]

    def value(self, stored: Hyper) -> Hyper:
        """What the losses see; differentiable."""
        return self._map(lambda space: space.value, stored)

    def store(self, value: Hyper) -> Hyper:
        """What is kept in a state, of a value to start from."""
        return self._map(lambda space: lambda x: space.store(jnp.asarray(x)), value)

    def project(self, stored: Hyper) -> Hyper:
        """What is stored, moved to where it may be."""
        return self._map(lambda space: space.project or _same, stored)

    def settle(self, stored: Hyper) -> Hyper:
        """The values to take home: whole numbers, and one of the choices."""
        return self._map(lambda space: space.settle or space.value, stored)

    @property
    def projects(self) -> bool:
        """Whether any of the spaces is kept by a projection."""
        return any(space.project is not None for space in self.spaces)

    @property
    def ties(self) -> bool:
        """Whether a projection moves numbers because of others."""
        return any(space.ties for space in self.spaces)

    @property
    def discrete(self) -> bool:
        """Whether any of the spaces is discrete."""
        return any(space.settle is not None for space in self.spaces)

    def _map(self, of: Callable[[Space], Callable[[Any], Any]], tree: Hyper) -> Hyper:
        leaves = self.structure.flatten_up_to(tree)
        moved = [of(space)(x) for space, x in zip(self.spaces, leaves, strict=True)]
        return jax.tree.unflatten(self.structure, moved)


def _same(x: Any) -> Any:
    return x


def declared(space: PyTree, hyperparams: Hyper) -> Declared:
    """The spaces of a tree of hyperparameters, which are values in them.

    Args:
        space: A tree of `Space`, or a prefix of the hyperparameters'; None: anywhere.

    Raises:
        TypeError: a leaf of `space` is something else.
        ValueError: it is no prefix, or a value is outside of its space; the message names the leaf.
    """
    space = jax.tree.map(
        lambda each: unconstrained() if each is None else each, space, is_leaf=lambda x: x is None
    )
    for name, leaf in leaves_with_names(space):
        if not isinstance(leaf, Space):
            raise TypeError(
                f"space leaf {name} must be one of gradhpo.spaces, such as spaces.log(), got "
                f"{leaf!r}."
            )
    try:
        tree = tree_broadcast(space, hyperparams)
    except ValueError as error:
        raise ValueError(
            "space must be a tree like the hyperparameters, or a prefix of it, but "
            f"{jax.tree.structure(space)} is none of {jax.tree.structure(hyperparams)}."
        ) from error
    spaces, structure = jax.tree.flatten(tree)
    for (name, value), each in zip(leaves_with_names(hyperparams), spaces, strict=True):
        if wrong := each.refuses(np.asarray(value)) or _lost(each, value):
            raise ValueError(
                f"leaf {name} of the hyperparameters, {value}, {wrong}. Its space is {each}, in "
                "natural scale."
            )
    return Declared(structure, tuple(spaces))


def _lost(space: Space, value: Any) -> str | None:
    """What is wrong with a value as it would be stored, in the types of JAX."""
    if not np.isfinite(value).all():
        return "is not finite"
    with jax.ensure_compile_time_eval():  # a number even where a jitted function declares
        stored = np.asarray(space.store(jnp.asarray(value)))
    if not np.isfinite(stored).all():
        return f"is too close to a bound for {stored.dtype}: it would be stored as {stored}"
    return None


@functools.lru_cache(maxsize=64)
def bind(problem: BilevelProblem, spaces: Declared) -> BilevelProblem:
    """The problem whose hyperparameters are as `spaces` store them."""

    def of_loss(loss: Any) -> Any:
        if loss is None:
            return None
        return lambda w, lam, batch, *state: loss(w, spaces.value(lam), batch, *state)

    dynamics, parts, begin = problem.dynamics, problem.dynamics.parts, problem.begin
    return BilevelProblem(
        Dynamics(
            lambda w, lam: dynamics.init(w, spaces.value(lam)),
            lambda inner, lam, batch: dynamics.step(inner, spaces.value(lam), batch),
            None
            if parts is None
            else Parts(
                of_loss(parts.train_loss), lambda lam: parts.make_optimizer(spaces.value(lam))
            ),
        ),
        of_loss(problem.outer_loss),
        of_loss(problem.train_loss),
        None if begin is None else lambda w, lam, draw: begin(w, spaces.value(lam), draw),
    )
