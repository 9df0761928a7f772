"""Modules of Flax and Equinox that come as `params` with more in them than weights.

None of these libraries is imported: a class is known by the name of its module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["check_taken_apart"]


def check_taken_apart(params: Any) -> None:
    """Refuse what would be trained, or not carried, by mistake; the message names the recipe.

    Raises:
        TypeError: an NNX module or state with statistics or keys, an Equinox module with leaves
            that are no arrays, the variables of a Linen module with their statistics.
    """
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        raise TypeError(
            "params holds the whole variables of a Flax Linen module. Give variables['params'] as "
            "params and the other collections as init(..., model_state=), " + _as_in("flax_linen")
        )
    for variable in _found(params, "flax.nnx", "Variable"):
        if not _is(variable, "flax.nnx", "Param"):
            raise TypeError(
                f"params holds a {type(variable).__name__} of Flax NNX, which is no weight. Take "
                "the module apart, graph, params, state = nnx.split(module, nnx.Param, ...), and "
                "give the state as init(..., model_state=), " + _as_in("flax_nnx")
            )
    for module in _found(params, "equinox", "Module"):
        for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
            if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
                raise TypeError(
                    f"leaf {jax.tree_util.keystr(path)} of an Equinox module in params is no array "
                    f"but {leaf!r}. Take the module apart, params, static = eqx.partition(module, "
                    "eqx.is_inexact_array), and combine them in the losses, "
                    + _as_in("equinox_modules")
                )


def _as_in(recipe: str) -> str:
    return f"as in the recipe gradhpo.examples.recipes.{recipe} (docs/your_model.md)."


def _is(value: Any, package: str, name: str) -> bool:
    return any(
        base.__name__ == name and f"{base.__module__}.".startswith(f"{package}.")
        for base in type(value).__mro__
    )


def _found(tree: Any, package: str, name: str) -> list[Any]:
    """The outermost nodes of a tree whose type is, or derives from, a class of a package."""

    def wanted(node):
        return _is(node, package, name)

    return [node for node in jax.tree.leaves(tree, is_leaf=wanted) if wanted(node)]
