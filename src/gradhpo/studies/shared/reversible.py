"""What the studies after Maclaurin et al. (2015) share: data, networks, batches."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.core.types import DataBatch

__all__ = ["Rows", "batches", "cross_entropy", "from_noise", "logits", "names", "noise", "rows"]

CLASSES = 10


class Rows(NamedTuple):
    """Examples in file order, images flat."""

    train: DataBatch
    val: DataBatch
    test: DataBatch


def rows(data: datasets.Dataset, *sizes: int, centred: bool = True) -> Rows:
    """The first rows of the training set for training, the next for validation and for tests.

    `centred`: the mean image of the whole training set is subtracted.
    """
    images = data.train.inputs.reshape(len(data.train.inputs), -1)
    mean = images.mean(axis=0) if centred else np.zeros(images.shape[1], np.float32)
    ends = np.cumsum((0, *sizes))
    if ends[-1] > len(images):
        raise ValueError(
            f"{data.name} has {len(images)} training examples, {ends[-1]} are asked for."
        )
    parts = [
        DataBatch(jnp.asarray(images[a:b] - mean), jnp.asarray(data.train.targets[a:b]))
        for a, b in itertools.pairwise(ends)
    ]
    return Rows(*parts)


def names(leaves: int) -> list[str]:
    """Of the leaves of a network, in order: every layer's weights and biases.

    >>> names(4)
    ['weights 1', 'biases 1', 'weights 2', 'biases 2']
    """
    return [f"{'biases' if i % 2 else 'weights'} {1 + i // 2}" for i in range(leaves)]


def noise(key: jax.Array, layers: tuple[int, ...]) -> list[jax.Array]:
    """Standard normal weights and biases, the leaves of a network."""
    shapes = [s for a, b in itertools.pairwise(layers) for s in ((a, b), (b,))]
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def from_noise(leaves: list[jax.Array], log_scale: jax.Array) -> list[jax.Array]:
    """Initial weights: a scale for each leaf."""
    return [jnp.exp(s) * x for s, x in zip(log_scale, leaves, strict=True)]


def batches(key: jax.Array, steps: int, size: int, examples: int) -> jax.Array:
    """Indices (steps, size), drawn with replacement."""
    return jax.random.randint(key, (steps, size), 0, examples)


def logits(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """A network of tanh units; without a hidden layer, logistic regression."""
    pairs = list(zip(params[::2], params[1::2], strict=True))
    for weights, biases in pairs[:-1]:
        x = jnp.tanh(x @ weights + biases)
    weights, biases = pairs[-1]
    return x @ weights + biases


def cross_entropy(params: list[jax.Array], data: Any) -> jax.Array:
    """Mean over the examples."""
    x, y = data
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()
