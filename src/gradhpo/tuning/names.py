"""Leaves of a tree under plain names, as people write them: `rates/hidden`."""

from typing import Any

import jax

__all__ = ["named_leaves"]

ALONE = "value"  # the name of a tree that is one leaf


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by the keys on the way to them.

    >>> named_leaves({"rates": {"hidden": 0.1}, "decay": [1.0, 2.0]})
    {'decay/0': 1.0, 'decay/1': 2.0, 'rates/hidden': 0.1}
    >>> named_leaves(0.5)
    {'value': 0.5}
    """
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(map(_word, path)) or ALONE: leaf for path, leaf in found}


def _word(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
