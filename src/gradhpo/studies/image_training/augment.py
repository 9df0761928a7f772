"""Images moved, enlarged and recoloured at random, by strengths that have a derivative.

What happens to an image is drawn beforehand, a number from -1 to 1 for each of `DRAWS`, and is part
of its batch; a strength says how far. So the same batch is the same numbers whatever the strengths,
and a strength acts through a product alone.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["DRAWS", "STRENGTHS", "augmented"]

STRENGTHS = ("shift", "zoom", "light", "contrast", "tint")
DRAWS = 2 + 1 + 1 + 1 + 3  # numbers of an image: down and right, and three colours for the tint


def augmented(images: jax.Array, draws: jax.Array, strength: Mapping[str, ArrayLike]) -> jax.Array:
    """Every image by its own draws.

    Args:
        images: (n, height, width, 3), floats; what lies outside of them is 0.
        draws: (n, DRAWS), from -1 to 1.
        strength: Of each of `STRENGTHS`, the most that a draw can do: `shift` in half images,
            `zoom` as the logarithm of a factor, `light` and `tint` as what is added to all colours
            and to each, `contrast` as the logarithm of a factor.

    Resampling is bilinear along rows and columns, two products of matrices: a gather and its
    derivative, a scatter, are slow on CPU.

    >>> images = jnp.arange(12.0).reshape(1, 2, 2, 3)
    >>> same = augmented(images, jnp.ones((1, DRAWS)), dict.fromkeys(STRENGTHS, 0.0))
    >>> bool(jnp.allclose(same, images, atol=1e-5))
    True
    """
    places, zoom, light, contrast, tint = jnp.split(draws, (2, 3, 4, 5), axis=1)
    places = jnp.asarray(strength["shift"] * places)
    zoom = jnp.exp(strength["zoom"] * zoom)
    rows, columns = (
        jax.vmap(_resampling, (0, 0, None))(places[:, i], zoom[:, 0], side)
        for i, side in enumerate(images.shape[1:3])
    )
    x = jnp.einsum("nij,njwc->niwc", rows, images)
    x = jnp.einsum("nij,nhjc->nhic", columns, x)
    factor = jnp.exp(strength["contrast"] * contrast)
    shade = strength["light"] * light + strength["tint"] * tint
    return x * factor[:, None, None] + shade[:, None, None]


def _resampling(shift: jax.Array, zoom: jax.Array, side: int) -> jax.Array:
    """(side, side): how much of each old line a new one takes, at most two neighbours."""
    half = (side - 1) / 2
    old = jnp.arange(side)
    new = (old - half) * zoom + half * (1 + shift)
    return jnp.maximum(1 - jnp.abs(new[:, None] - old), 0)
