"""A small convolutional network trained on few photographs; nearly every setting may be tuned.

Three 3 x 3 convolutions of stride 2, each with a ReLU, the mean over all places and a linear layer;
AdamW for T steps from the same weights, on the same batches. Hyperparameters, 30 numbers:

    rate       of each layer, at five times of the training, straight lines between them
    decay      weight decay of each layer
    smoothing  of the labels
    strength   of each kind of augmentation, see `gradhpo.studies.image_training.augment`

The validation loss is the cross-entropy of plain images at the end. A convolution is a product of
matrices, which is fast on CPU inside of compiled loops as well.
"""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import spaces
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.source import InOrder, Resident
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch
from gradhpo.datasets import Dataset, split
from gradhpo.meta.convolution import convolution
from gradhpo.meta.networks import cross_entropy, pixels
from gradhpo.schedules import piecewise
from gradhpo.studies.image_training.augment import DRAWS, STRENGTHS, augmented

__all__ = [
    "KNOTS",
    "LAYERS",
    "SPACE",
    "Batch",
    "ByHand",
    "Sizes",
    "batches",
    "init",
    "logits",
    "problem",
    "start",
    "task",
]

LAYERS = ("conv1", "conv2", "conv3", "out")
CHANNELS = (3, 16, 32, 64)
KNOTS = (0.0, 0.1, 0.4, 0.7, 1.0)  # parts of the training
SHAPE = (0.1, 1.0, 0.75, 0.25, 0.01)  # of the rate to start from: warm-up, then near to a cosine

SPACE = {
    "rate": spaces.log(),
    "decay": spaces.log(),
    "smoothing": spaces.interval(0.0, 0.5),
    "strength": spaces.log(),
}


class Batch(NamedTuple):
    """Training examples of a step."""

    images: Any  # (n, side, side, 3), uint8, some of them mirrored
    labels: Any  # (n,), int32
    draws: Any  # (n, DRAWS), from -1 to 1


class Sizes(NamedTuple):
    """How much of everything there is in a training."""

    steps: int = 400
    batch: int = 64
    train: int = 1000  # examples
    val: int = 2000


class ByHand(NamedTuple):
    """What is set by hand, the same for all layers and all kinds of augmentation."""

    peak: Any
    decay: Any
    smoothing: Any
    strength: Any


def start(by_hand: ByHand) -> dict[str, Any]:
    """The hyperparameters that were set by hand, where the others start as well."""
    peak, decay, smoothing, strength = map(np.float32, by_hand)
    return {
        "rate": dict.fromkeys(LAYERS, tuple(peak * np.array(SHAPE, np.float32))),
        "decay": dict.fromkeys(LAYERS, decay),
        "smoothing": smoothing,
        "strength": dict.fromkeys(STRENGTHS, strength),
    }


def init(key: jax.Array, classes: int) -> dict[str, dict[str, jax.Array]]:
    """Weights and biases of the layers."""
    sizes = [(3, 3, m, n) for m, n in zip(CHANNELS[:-1], CHANNELS[1:], strict=True)]
    draw = jax.nn.initializers.he_normal()
    return {
        name: {"w": draw(k, size), "b": jnp.zeros(size[-1])}
        for name, k, size in zip(
            LAYERS, jax.random.split(key, 4), [*sizes, (CHANNELS[-1], classes)], strict=True
        )
    }


def logits(params: Any, images: jax.Array) -> jax.Array:
    """Scores (n, classes) of floats (n, side, side, 3)."""
    x = images
    for name in LAYERS[:-1]:
        x = jax.nn.relu(convolution(x, params[name]["w"], (2, 2)) + params[name]["b"])
    return x.mean((1, 2)) @ params["out"]["w"] + params["out"]["b"]


def train_loss(params: Any, lam: Any, batch: Batch) -> jax.Array:
    """Cross-entropy of augmented images with smoothed labels."""
    scores = logits(params, augmented(pixels(batch.images), batch.draws, lam["strength"]))
    wanted = optax.smooth_labels(jax.nn.one_hot(batch.labels, scores.shape[-1]), lam["smoothing"])
    return optax.softmax_cross_entropy(scores, wanted).mean()


def val_loss(params: Any, lam: Any, batch: DataBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of images as they are, and the part of them that is classed right."""
    del lam
    scores = logits(params, pixels(batch.inputs))
    right = scores.argmax(-1) == batch.targets
    return cross_entropy(scores, batch.targets).mean(), {"accuracy": right.mean()}


@cache
def problem(steps: int) -> BilevelProblem:
    """The problem of trainings of so many steps; the same object always, so programs are kept."""
    return BilevelProblem(from_optax(train_loss, _optimizer(steps)), val_loss)


def _optimizer(steps: int) -> Callable[[Any], optax.GradientTransformation]:
    at = steps * np.array(KNOTS, np.float32)

    def optimizer(lam: Any) -> optax.GradientTransformation:
        each: dict[Hashable, optax.GradientTransformation] = {
            name: optax.adamw(
                piecewise(lam["rate"][name], at),
                b2=0.99,  # of a short training
                eps_root=1e-8,
                weight_decay=lam["decay"][name],
            )
            for name in LAYERS
        }
        return optax.partition(each, {name: name for name in LAYERS})

    return optimizer


def batches(data: DataBatch, sizes: Sizes, seed: int) -> Batch:
    """All batches of a training, (T, n, ...): every example once, then in another order again."""
    rng, shape = np.random.default_rng(seed), (sizes.steps, sizes.batch)
    total, count = sizes.steps * sizes.batch, len(data.targets)
    orders = [rng.permutation(count) for _ in range(-(-total // count))]
    rows = np.concatenate(orders)[:total].reshape(shape)
    mirrored = rng.random((*shape, 1, 1, 1)) < 0.5
    images = np.where(mirrored, data.inputs[:, :, ::-1][rows], data.inputs[rows])
    draws = rng.uniform(-1, 1, (*shape, DRAWS)).astype(np.float32)
    return Batch(images, data.targets[rows].astype(np.int32), draws)


def task(data: Dataset, sizes: Sizes, hyperparams: Any, seed: int) -> Task:
    """The training of a seed: its examples, its batches and its weights to start from.

    Args:
        data: Images as uint8. Whatever of the training examples is neither trained nor validated
            on is tested on, beside the test examples.

    Raises:
        ValueError: there are not so many examples.
    """
    left = max(len(data.train.targets) - sizes.train - sizes.val, 0)
    parts = split(data.train, [sizes.train, sizes.val, *[left][: left > 0]], seed)
    train, val, *rest = (_int32(part) for part in (*parts, data.test) if part is not None)
    return Task(
        problem(sizes.steps),
        init(jax.random.key(seed), data.num_classes),
        hyperparams,
        InOrder(batches(train, sizes, seed)),
        Resident(val, sizes.val, seed),
        space=SPACE,
        test=DataBatch(*(np.concatenate(each) for each in zip(*rest, strict=True))),
    )


def _int32(data: DataBatch) -> DataBatch:
    return DataBatch(data.inputs, np.asarray(data.targets, np.int32))
