"""The small convolutional network of the study `hyper_cleaning`, its two losses, the task."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch

__all__ = ["PROBLEM", "init", "logits", "task", "train_loss", "val_loss"]

CHANNELS, KERNEL = 8, 3
LAYERS = ("conv1", "conv2", "conv3")


def init(seed: int, images: np.ndarray) -> dict[str, Any]:
    """Three convolutions of 8 channels and a linear layer; He's initialisation."""
    params: dict[str, Any] = {}
    key, (height, width, channels) = jax.random.key(seed), images.shape[1:]
    for name in LAYERS:
        key, own = jax.random.split(key)
        w = jax.random.normal(own, (KERNEL, KERNEL, channels, CHANNELS))
        w = w * np.sqrt(2 / (KERNEL * KERNEL * channels)).astype(w.dtype)
        params[name] = {"w": w, "b": jnp.zeros(CHANNELS)}
        stride, channels = _stride(height), CHANNELS
        height, width = -(-height // stride), -(-width // stride)
    rows = height * width * channels
    w = jax.random.normal(key, (rows, 10)) / np.sqrt(rows)
    params["dense"] = {"w": w, "b": jnp.zeros(10)}
    return params


def logits(params: Any, images: Any) -> jax.Array:
    """Images `(n, height, width, channels)` to scores `(n, 10)`; 4 x 4 pixels stay at the end."""
    x = images.astype(params["dense"]["w"].dtype)
    for name in LAYERS:
        strides = (_stride(x.shape[1]),) * 2
        x = lax.conv_general_dilated(
            x, params[name]["w"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[name]["b"])
    return x.reshape(len(x), -1) @ params["dense"]["w"] + params["dense"]["b"]


def _stride(side: int) -> int:
    """2 while the side is longer than 4: 28, 14, 7, 4 for MNIST and 8, 4, 4, 4 for digits."""
    return 2 if side > 4 else 1


def _losses(params: Any, images: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)


def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
    """The mean of sigmoid(lam_i) times the loss of example i."""
    images, labels, rows = batch
    return jnp.mean(jax.nn.sigmoid(lam[rows]) * _losses(params, images, labels))


def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
    """The plain mean loss."""
    del lam
    return jnp.mean(_losses(params, *batch))


PROBLEM = BilevelProblem(from_optax(train_loss, optax.sgd(0.1, momentum=0.9)), val_loss)


def task(seed: int, train: DataBatch, val: DataBatch, test: DataBatch | None = None) -> Task:
    """A weight for each training example; every step sees all of them, and their numbers.

    >>> data = DataBatch(np.zeros((5, 8, 8, 1), np.float32), np.arange(5))
    >>> task(0, data, data).hyperparams.shape
    (5,)
    """
    size = len(train.targets)
    examples = (*train, np.arange(size, dtype=np.int32))
    return Task(
        PROBLEM,
        init(seed, train.inputs),
        np.zeros(size, np.float32),
        train=lambda: examples,
        val=lambda: tuple(val),
        natural=lambda lam: {"weight": jax.nn.sigmoid(lam)},
        test=test,
    )
