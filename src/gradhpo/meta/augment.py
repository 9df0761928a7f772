"""Shifts and mirror images, on the device: random crops of padded images, half of them flipped.

What happens to an image is drawn beforehand, three numbers each, and is part of its batch. So a
loss that moves its images stays a function of its batch: every recomputation sees the same ones,
and so does an example that a method keeps for later.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.core.types import LossFn

__all__ = ["Move", "draw_moves", "move", "moved"]


class Move(NamedTuple):
    """What happens to each image; arrays of one shape."""

    down: jax.Array  # where the crop begins in the padded image, 0 to 2 pad
    right: jax.Array
    mirror: jax.Array  # bool: left becomes right


def draw_moves(key: jax.Array, shape: tuple[int, ...], pad: int) -> Move:
    """Uniform moves of images padded by `pad` pixels.

    >>> draw_moves(jax.random.key(0), (5, 100), 4).down.shape
    (5, 100)
    """
    down, right, mirror = jax.random.split(key, 3)
    places = [jax.random.randint(key, shape, 0, 2 * pad + 1) for key in (down, right)]
    return Move(places[0], places[1], jax.random.bernoulli(mirror, 0.5, shape))


def move(images: jax.Array, moves: Move, pad: int) -> jax.Array:
    """Images (n, height, width, channels) padded with zeros, cropped to their size, mirrored.

    >>> image = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> down_right = Move(jnp.array([0]), jnp.array([0]), jnp.array([False]))
    >>> print(move(image, down_right, 1)[0, :, :, 0])
    [[0. 0.]
     [0. 0.]]
    """
    around = ((pad, pad), (pad, pad), (0, 0))

    def one(image: jax.Array, move: Move) -> jax.Array:
        at = (move.down, move.right, 0)
        image = lax.dynamic_slice(jnp.pad(image, around), at, image.shape)
        return jnp.where(move.mirror, image[:, ::-1], image)

    return jax.vmap(one)(images, moves)


def moved(loss: LossFn, pad: int) -> LossFn:
    """`loss` of `(images, labels)` as one of `(images, (labels, moves))`, which `ManyShot` makes.

    >>> mean = moved(lambda params, lam, batch: jnp.mean(batch[0]), 1)
    >>> still = Move(jnp.array([1]), jnp.array([1]), jnp.array([True]))
    >>> print(mean((), (), (jnp.arange(4.0).reshape(1, 2, 2, 1), (jnp.zeros(1), still))))
    1.5
    """

    def of_moved(params, hyperparams, batch):
        images, (labels, moves) = batch
        if pad:
            images = move(images, moves, pad)
        return loss(params, hyperparams, (images, labels))

    return of_moved
