"""Discrete choices that have a derivative.

    straight_through     forward a round number, backward the identity
    gumbel_softmax       softmax((l + G) / tau), G = -log(-log u): a soft draw; hard: its largest
                         entry forward, the derivative of the soft one backward
    binary_concrete      sigmoid((l + log u - log(1 - u)) / tau): the same of one bit

Noise is data: draw the key where batches are drawn and give it to the loss with its batch. Every
recomputation of a step, of the methods that look back, then sees the same noise.

Jang, Gu, Poole (2017), "Categorical Reparameterization with Gumbel-Softmax", ICLR, eqs. (1), (2);
Maddison, Mnih, Teh (2017), "The Concrete Distribution", ICLR, eqs. (10), (16). Bengio, Leonard,
Courville (2013), section 4, for the straight-through estimate, which is biased.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["annealed", "binary_concrete", "gumbel_softmax", "one_hot", "straight_through"]


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """The value of `hard` with the derivative of `soft`.

    >>> rounded = lambda x: straight_through(jnp.round(x), x)
    >>> print(jax.value_and_grad(rounded)(2.7))
    (Array(3., dtype=float32...), Array(1., dtype=float32...))
    """
    return lax.stop_gradient(hard) + (soft - lax.stop_gradient(soft))  # hard, to the bit


def one_hot(scores: jax.Array) -> jax.Array:
    """1 at the largest entry of every row, the first of equal ones, and 0 elsewhere."""
    return jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)


def gumbel_softmax(
    logits: jax.Array, key: jax.Array, temperature: Any = 1.0, *, hard: bool = False
) -> jax.Array:
    """A draw from a categorical distribution, relaxed.

    Args:
        logits: Scores (..., n), not normalised.
        key: Of the draw.
        temperature: Above 0; towards 0 the draw is one of the choices.
        hard: Exactly one of the choices forwards, straight-through.

    Returns:
        Weights (..., n) that sum to 1.
    """
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(noisy / temperature)
    return straight_through(one_hot(noisy), soft) if hard else soft


def binary_concrete(
    logits: jax.Array, key: jax.Array, temperature: Any = 1.0, *, hard: bool = False
) -> jax.Array:
    """Independent bits with these log odds, relaxed to (0, 1); `hard` as in `gumbel_softmax`."""
    noisy = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(noisy / temperature)
    return straight_through((noisy > 0).astype(soft.dtype), soft) if hard else soft


def annealed(step: Any, start: float = 1.0, rate: float = 1e-3, lowest: float = 0.1) -> jax.Array:
    """A temperature: `max(lowest, start exp(-rate step))`.

    >>> print(annealed(0), annealed(10_000))
    1.0 0.1
    """
    return jnp.maximum(lowest, start * jnp.exp(-rate * jnp.asarray(step)))
