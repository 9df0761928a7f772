"""One training, and H weight decays in it: a network of some 10 000 weights on few digits.

The network is 64-136-10 with tanh. It learns from 100 handwritten digits, some of whose labels are
wrong, by T steps of gradient descent with momentum on all of them, and after each step

    w_i <- w_i / (1 + exp(lam_g)),    g = floor(i H / number of weights)

a weight decay that is stable at any size. What is tuned is lam, logarithms of the decays of H
groups of neighbouring weights (pixel by pixel in the first layer, unit by unit in the second), by
the loss on 400 clean digits after the last step. All groups start at the same decay, which is too
weak, and stay in a box around it. Nothing but the length of lam depends on H.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradhpo import datasets, spaces
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem, Start, Window
from gradhpo.core.source import Pool
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch, Params

__all__ = ["LARGEST", "START", "WIDTH", "decays", "family"]

PIXELS, HIDDEN, CLASSES = 64, 136, 10
LARGEST = PIXELS * HIDDEN + HIDDEN * CLASSES  # a decay for every weight
RATE, MOMENTUM = 0.3, 0.9
START, WIDTH = -5.0, 3.0  # of the logarithms: decays between 0.0003 and 0.14 a step
SIZES = {"train": 100, "val": 400, "test": 1024}
WRONG = 0.3  # of the training labels are drawn anew


def decays(lam: jax.Array, w: Params) -> Params:
    """The decay of every weight, of logarithms (H,)."""
    flat, back = ravel_pytree(w)
    return back(jnp.exp(lam)[np.arange(flat.size) * len(lam) // flat.size])


def loss(w: Params, lam: jax.Array, batch: DataBatch) -> jax.Array:
    """Mean cross-entropy; the decays stand in the training step."""
    del lam
    scores = jnp.tanh(jnp.asarray(batch.inputs) @ w["hidden"]) @ w["out"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets).mean()


def optimizer(lam: jax.Array) -> optax.GradientTransformation:
    """Momentum, then the decays."""

    def decay(updates, w):
        return jax.tree.map(lambda u, w, c: (w + u) / (1 + c) - w, updates, w, decays(lam, w))

    return optax.chain(optax.sgd(RATE, momentum=MOMENTUM), optax.stateless(decay))


@functools.lru_cache
def problem(steps: int) -> BilevelProblem:
    """All examples at each of so many steps; one object for all H and seeds, so that their programs
    are shared."""

    def begin(w, lam, key):
        del lam, key
        rows = (jnp.tile(jnp.arange(SIZES[side]), (steps, 1)) for side in ("train", "val"))
        return Start(w, Window(*rows))

    return BilevelProblem(from_optax(loss, optimizer), loss, begin=begin)


def data(seed: int) -> dict[str, DataBatch]:
    """Images (n, 64), centred, and labels, by side; only training labels are wrong."""
    digits, rng = datasets.digits().train, np.random.default_rng(seed)
    sizes = [*SIZES.values(), len(digits.targets) - sum(SIZES.values())]
    parts = dict(zip(SIZES, datasets.split(digits, sizes, seed), strict=False))
    images = {side: part.inputs.reshape(-1, PIXELS) for side, part in parts.items()}
    labels = {side: np.asarray(part.targets, np.int32) for side, part in parts.items()}
    wrong, anew = rng.random(SIZES["train"]) < WRONG, rng.integers(CLASSES, size=SIZES["train"])
    labels["train"] = np.where(wrong, anew, labels["train"]).astype(np.int32)
    mean = images["train"].mean(0)
    return {side: DataBatch(np.float32(images[side] - mean), labels[side]) for side in SIZES}


def initial(seed: int) -> Params:
    """Weights to start from."""
    normal = np.random.default_rng((seed, 1)).standard_normal
    return {
        "hidden": np.float32(normal((PIXELS, HIDDEN)) / np.sqrt(PIXELS)),
        "out": np.float32(normal((HIDDEN, CLASSES)) / np.sqrt(HIDDEN)),
    }


def family(steps: int) -> Callable[[int, int], Task]:
    """A function `(H, seed) -> task`, of trainings of so many steps.

    A task is made once, and the data of a seed lie on the device once.
    """

    @functools.cache
    def sides(seed: int) -> tuple[Pool, Pool, DataBatch]:
        parts = data(seed)
        return Pool(parts["train"]), Pool(parts["val"]), parts["test"]

    @functools.cache
    def task(size: int, seed: int) -> Task:
        train, val, test = sides(seed)
        box = spaces.interval(START - WIDTH, START + WIDTH, by="projection")
        lam = jnp.full(size, START)
        return Task(problem(steps), initial(seed), lam, train, val, space=box, test=test)

    return task
