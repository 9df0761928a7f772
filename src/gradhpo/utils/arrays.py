"""What users and their data loaders hand in, as NumPy's and JAX's arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_arrays", "owned"]


def as_arrays(batch: Any) -> Any:
    """Lists of numbers and foreign arrays become NumPy's; containers of arrays, and arrays, stay.

    >>> as_arrays((np.ones(2), [0, 1]))
    (array([1., 1.]), array([0, 1]))
    """
    return jax.tree.map(_as_array, batch, is_leaf=_is_numbers)


def _as_array(x: Any) -> Any:
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return x
    if isinstance(x, list):
        try:
            return np.asarray(x)
        except ValueError:
            raise ValueError(
                f"a list of numbers stands for an array, but this one is ragged: {x!r}. Pad it, or "
                "give its parts as arrays of their own."
            ) from None
    if not hasattr(x, "__array__"):
        return x
    try:  # an array of another library, such as a tensor of PyTorch on the host
        return np.asarray(x)
    except TypeError:  # of a dtype that NumPy has not: PyTorch's bfloat16
        if not hasattr(x, "__dlpack__"):
            raise
        return np.asarray(jnp.from_dlpack(x))


def _is_numbers(x: Any) -> bool:
    if not isinstance(x, list):
        return False
    leaves = jax.tree.leaves(x)
    return not any(hasattr(y, "shape") for y in leaves) and (bool(leaves) or not x)


def owned(batch: Any) -> Any:
    """`as_arrays`, with copies of NumPy arrays.

    A program may still be reading the memory of its arguments when the call has returned, while
    the caller already refills it.
    """
    return jax.tree.map(_own, batch, is_leaf=_is_numbers)


def _own(x: Any) -> Any:
    x = _as_array(x)
    return np.array(x) if isinstance(x, np.ndarray) else x
