"""Norms in float64 by NumPy, whatever the precision of JAX is: what errors are measured with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["floats", "norm"]


def floats(tree: Any) -> list[np.ndarray]:
    """The leaves as float64 arrays; typed PRNG keys by their bits.

    >>> floats({"w": 1, "b": jnp.zeros(2)})
    [array([0., 0.]), array(1.)]
    """

    def leaf(x):
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).astype(np.float64)

    return [leaf(x) for x in jax.tree.leaves(tree)]


def norm(leaves: list[np.ndarray]) -> float:
    """Euclidean norm over all leaves.

    >>> norm([np.array(3.0), np.array([4.0])])
    5.0
    """
    return float(np.sqrt(sum(np.sum(x * x) for x in leaves)))
