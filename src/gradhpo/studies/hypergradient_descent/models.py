"""The three models of the study `hypergradient_descent`, their data, and crops and flips.

Weights and biases of a linear layer start uniform within 1 / sqrt(inputs), as in PyTorch;
those of a convolution normal with variance 2 / (9 outputs) and at zero, as in the authors' VGG.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradhpo import datasets
from gradhpo.core.types import DataBatch

__all__ = ["MODELS", "Images", "Model", "augmented", "images"]

CONSTANTS = {  # mean and deviation by which the authors normalise
    "mnist": (0.1307, 0.3081),
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DIGITS = 1437  # examples to train on, four fifths; the set has no test part of its own
VGG_16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
WIDE = 512  # of VGG's two hidden layers
PAD = 4  # pixels


class Images(NamedTuple):
    """Training and validation examples, inputs in [0, 1], and how to normalise them."""

    train: DataBatch
    val: DataBatch
    mean: jax.Array
    std: jax.Array
    files: dict[str, str]


class Model(NamedTuple):
    """A classifier of ten classes.

    `init(key, shape)` gives `(params, running)`; `scores(params, running, inputs, key)` gives
    `(scores, running)`, where `running` holds averages of batch normalisation; a key of None
    asks for the scores of the trained model: no dropout, averages used rather than updated.
    """

    init: Callable[[jax.Array, tuple[int, ...]], tuple[Any, Any]]
    scores: Callable[[Any, Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
    augments: bool = False


def images(name: str, data_dir: Any, train_size: int = 0, val_size: int = 0) -> Images:
    """Load a data set: the first examples of its parts, or all for a size of 0.

    The validation part is the test data, on which the authors validate; no choice here is
    made by it.

    >>> data = images("digits", None, 100)
    >>> data.train.inputs.shape, len(data.val.targets)
    ((100, 8, 8, 1), 360)
    """
    data = datasets.load(name, data_dir)
    train, val = data.train, data.test
    if val is None:
        train, val = datasets.split(train, (DIGITS, len(train.targets) - DIGITS), seed=0)
    train, val = (
        DataBatch(*(array[: size or None] for array in part))
        for part, size in ((train, train_size), (val, val_size))
    )
    mean, std = CONSTANTS.get(name, (train.inputs.mean(), train.inputs.std()))
    train, val = (DataBatch(*map(jnp.asarray, part)) for part in (train, val))
    mean, std = (jnp.asarray(x, jnp.float32) for x in (mean, std))
    return Images(train, val, mean, std, data.files)


def augmented(key: jax.Array, inputs: jax.Array) -> jax.Array:
    """A random crop of every image, padded by 4 black pixels, and a flip of every second one."""
    crop, flip = jax.random.split(key)
    padded = jnp.pad(inputs, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    corners = jax.random.randint(crop, (len(inputs), 2), 0, 2 * PAD + 1)
    cut = jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), inputs.shape[1:]))
    inputs = cut(padded, corners)
    flipped = jax.random.bernoulli(flip, 0.5, (len(inputs), 1, 1, 1))
    return jnp.where(flipped, inputs[:, :, ::-1], inputs)


def _perceptron(*hidden: int) -> Model:
    """Linear layers with ReLU between them; none hidden is logistic regression."""

    def init(key, shape):
        return _linear_layers(key, (int(np.prod(shape)), *hidden, 10)), ()

    def scores(params, running, inputs, key):
        del key
        x = inputs.reshape(len(inputs), -1)
        for layer in params[:-1]:
            x = jax.nn.relu(_apply(layer, x))
        return _apply(params[-1], x), running

    return Model(init, scores)


def _vgg() -> Model:
    """VGG-16 with batch normalisation and dropout, for images of 32 x 32 pixels."""

    def init(key, shape):
        key, last = jax.random.split(key)
        convolutions, running, channels = [], [], shape[-1]
        for width in (x for x in VGG_16 if isinstance(x, int)):
            key, own = jax.random.split(key)
            w = np.sqrt(2 / (9 * width)) * jax.random.normal(own, (3, 3, channels, width))
            zeros, ones = jnp.zeros(width), jnp.ones(width)
            convolutions.append({"w": w, "b": zeros, "scale": ones, "shift": zeros})
            running.append({"mean": zeros, "var": ones})
            channels = width
        params = {"conv": convolutions, "dense": _linear_layers(last, (WIDE, WIDE, WIDE, 10))}
        return params, running

    def scores(params, running, inputs, key):
        x, updated, layers = inputs, [], iter(zip(params["conv"], running, strict=True))
        for width in VGG_16:
            if width == "M":
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
                continue
            layer, averages = next(layers)
            x = lax.conv_general_dilated(
                x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, averages = _normalise(layer, averages, x + layer["b"], train=key is not None)
            x = jax.nn.relu(x)
            updated.append(averages)
        x = x.reshape(len(x), -1)
        for i, layer in enumerate(params["dense"][:-1]):
            if key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape)
                x = jnp.where(kept, 2 * x, 0)
            x = jax.nn.relu(_apply(layer, x))
        return _apply(params["dense"][-1], x), updated

    return Model(init, scores, augments=True)


MODELS: dict[str, Model] = {
    "logreg": _perceptron(),
    "mlp": _perceptron(1000, 1000),
    "vgg": _vgg(),
}


def _linear_layers(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        key, w, b = jax.random.split(key, 3)
        bound = inputs**-0.5
        layers.append(
            {
                "w": jax.random.uniform(w, (inputs, outputs), minval=-bound, maxval=bound),
                "b": jax.random.uniform(b, (outputs,), minval=-bound, maxval=bound),
            }
        )
    return layers


def _apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def _normalise(layer: Any, averages: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    """Batch normalisation over examples and pixels; running averages move by a tenth."""
    mean, var = averages["mean"], averages["var"]
    if train:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        count = x.size // x.shape[-1]
        seen = {"mean": mean, "var": var * count / (count - 1)}
        averages = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, averages, seen)
    return (x - mean) * lax.rsqrt(var + 1e-5) * layer["scale"] + layer["shift"], averages
