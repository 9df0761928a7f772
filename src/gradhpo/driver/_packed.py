"""A tree whose single numbers travel together.

A call of a compiled program costs a few microseconds for every array that goes in or comes out, and
half of the leaves of a state are single numbers: metrics, counts, positions.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.core.types import PyTree

__all__ = ["Packed"]


@jax.tree_util.register_pytree_node_class
class Packed:
    """A tree with one array for all its scalars of a dtype.

    >>> packed = Packed.of({"a": jnp.array(1.0), "b": jnp.array(2.0), "c": jnp.zeros(3)})
    >>> [x.shape for x in jax.tree.leaves(packed)], print(packed.tree()["b"])
    2.0
    ([(3,), (2,)], None)
    """

    def __init__(self, arrays: list[Any], scalars: dict[str, Any], layout: Any):
        self.arrays, self.scalars, self.layout = arrays, scalars, layout

    @classmethod
    def of(cls, tree: PyTree) -> "Packed":
        """For traced trees."""
        leaves, structure = jax.tree.flatten(tree)
        kinds = tuple(map(_kind, leaves))
        arrays = [x for x, kind in zip(leaves, kinds, strict=True) if kind is None]
        scalars: dict[str, list[Any]] = {}
        for x, kind in zip(leaves, kinds, strict=True):
            if kind is not None:
                scalars.setdefault(kind, []).append(x)
        return cls(arrays, {k: jnp.stack(x) for k, x in scalars.items()}, (structure, kinds))

    def tree(self) -> PyTree:
        """The tree as it was."""
        structure, kinds = self.layout
        arrays = iter(self.arrays)
        scalars = {kind: iter(x) for kind, x in _apart(self.scalars).items()}
        return jax.tree.unflatten(
            structure, [next(arrays if kind is None else scalars[kind]) for kind in kinds]
        )

    def tree_flatten(self) -> tuple[Any, Any]:
        """For JAX."""
        return (self.arrays, self.scalars), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Any, children: Any) -> "Packed":
        """For JAX."""
        arrays, scalars = children
        return cls(arrays, scalars, layout)


@jax.jit
def _apart(scalars: dict[str, Any]) -> dict[str, list[Any]]:
    return {kind: list(x) for kind, x in scalars.items()}


def _kind(x: Any) -> str | None:
    """The dtype of a scalar; None for an array, and for a PRNG key."""
    plain = jnp.ndim(x) == 0 and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return str(x.dtype) if plain else None
