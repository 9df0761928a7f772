"""Splitting a tree into the leaves that are differentiated and the rest.

Step counts, PRNG keys and integer parameters live beside floating-point leaves in
one state. They are split off here and nowhere else, so that no estimator ever meets
a `float0` cotangent.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["NOT_REAL", "is_differentiable", "merge", "scalar_dtype", "split"]

NOT_REAL = (
    "weights and optimizer slots must be real, but it is {}. Keep the real and the imaginary part "
    "as two leaves, and make the complex number inside the loss: jax.lax.complex(w['re'], w['im'])."
)


def is_differentiable(leaf: Any) -> bool:
    """True for a real floating-point leaf (arrays, NumPy arrays and Python floats).

    Raises:
        TypeError: the leaf is complex: it would be carried like an integer, and training
            would go on without it.
    """
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"a leaf of shape {jnp.shape(leaf)}: {NOT_REAL.format(dtype)}")
    return jnp.issubdtype(dtype, jnp.floating)


def split(tree: Any) -> tuple[Any, Any]:
    """`(differentiable, rest)`: two trees of one outline, None where the other has the leaf.

    >>> split({"w": 1.0, "count": 3})
    ({'count': None, 'w': 1.0}, {'count': 3, 'w': None})

    Raises:
        TypeError: a leaf is complex.
    """
    floating = jax.tree.map(lambda x: x if is_differentiable(x) else None, tree)
    rest = jax.tree.map(lambda x: None if is_differentiable(x) else x, tree)
    return floating, rest


def merge(floating: Any, rest: Any) -> Any:
    """Inverse of `split`.

    >>> merge({"w": 1.0, "count": None}, {"w": None, "count": 3})
    {'count': 3, 'w': 1.0}
    """
    return jax.tree.map(
        lambda x, y: y if x is None else x, floating, rest, is_leaf=lambda x: x is None
    )


def scalar_dtype(tree: Any) -> Any:
    """The dtype for scalars that accompany `tree`: its own, and at least float32."""
    floating = [jnp.result_type(x) for x in jax.tree.leaves(tree) if is_differentiable(x)]
    return jnp.result_type(jnp.float32, *floating)
