"""The k largest numbers of a tree, by counts alone."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.core.types import PyTree
from gradhpo.utils._partition import scalar_dtype

__all__ = ["largest"]


@functools.partial(jax.jit, static_argnames="k")  # one program for many calls outside of others
def largest(gains: PyTree, k: int) -> PyTree:
    """Masks of the k largest numbers of a tree, none of which is negative; of equal ones the first.

    Floats that are not negative are ordered as their bits are. Of these the k-th largest is found
    between two of which more and fewer are at least as large, by counts alone: exact, without a
    sort, and where an array lies on many devices it stays.

    >>> print(largest(jnp.array([1.0, 3.0, 2.0, 3.0]), 2))
    [False  True False  True]
    """
    leaves, structure = jax.tree.flatten(gains)
    dtype = scalar_dtype(gains)
    unsigned = jnp.uint64 if jnp.finfo(dtype).bits == 64 else jnp.uint32
    codes = [lax.bitcast_convert_type(x.astype(dtype), unsigned) for x in leaves]
    one = jnp.ones((), unsigned)

    def count(threshold: jax.Array) -> jax.Array:
        return sum(jnp.sum(x >= threshold, dtype=jnp.int32) for x in codes)  # type: ignore[return-value]

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, upto_low, _, _ = state
        return (upto_low > k) & (high - low > one)

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """count(low) >= k > count(high): in turns a secant between them, and the middle."""
        low, high, upto_low, upto_high, secant = state
        part = (upto_low - k).astype(dtype) / (upto_low - upto_high).astype(dtype)
        inside = (part * (high - low).astype(dtype)).astype(unsigned)
        middle = low + jnp.where(secant, jnp.clip(inside, one, high - low - one), (high - low) // 2)
        upto = count(middle)
        enough = upto >= k
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, upto, upto_low),
            jnp.where(enough, upto_high, upto),
            ~secant,
        )

    total = jnp.asarray(sum(x.size for x in codes), jnp.int32)
    over = jnp.stack([jnp.max(x, initial=0) for x in codes]).max() + one
    start = (jnp.zeros((), unsigned), over, total, jnp.zeros((), jnp.int32), jnp.array(True))
    kth, _, upto, above, _ = lax.while_loop(unfinished, narrow, start)

    def all_of_them() -> list[jax.Array]:
        return [x >= kth for x in codes]

    def the_first() -> list[jax.Array]:
        masks, left = [], k - above
        for x in codes:
            tied = (x == kth).ravel()
            rank = jnp.cumsum(tied, dtype=jnp.int32).reshape(x.shape)
            masks.append((x > kth) | ((x == kth) & (rank <= left)))
            left = left - jnp.sum(tied, dtype=jnp.int32)
        return masks

    return jax.tree.unflatten(structure, lax.cond(upto == k, all_of_them, the_first))
