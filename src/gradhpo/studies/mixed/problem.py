"""Is a digit odd or even? A network whose activation and width are hyperparameters, too.

Choices, one of three each, for both hidden layers together:

    activation   linear, sigmoid, relu
    width        2, 8 or 32 units: a gate before each closes those beyond

Numbers: a rate for each of three layers, a penalty for every pixel and for the two layers above,
and the dropout rate. Training is full-batch gradient descent with momentum for T steps; validation
is by other images. The noise of dropout is drawn from a key, which is the batch of its step, so
that a training run is a function of the hyperparameters alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import datasets, spaces
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import DataBatch
from gradhpo.transforms import scale_by_tree

__all__ = ["ACTIVATIONS", "LAYERS", "SPACE", "WIDTHS", "Data", "data", "init", "problem", "start"]

ACTIVATIONS = {"linear": lambda z: z, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}
WIDTHS = (2, 8, 32)
LAYERS = 3
MOMENTUM = 0.9
TEMPERATURE = 0.5  # of the derivative of dropout by its rate

SPACE = {
    "activation": spaces.categorical(len(ACTIVATIONS)),
    "width": spaces.categorical(len(WIDTHS)),
    "rate": spaces.log(),
    "pixel": spaces.log(),
    "penalty": spaces.log(),
    "dropout": spaces.interval(0.0, 0.9),
}


class Data(NamedTuple):
    """Images as rows (n, pixels), and labels 0 (even) or 1 (odd)."""

    train: DataBatch
    val: DataBatch
    test: DataBatch


def start(pixels: int) -> dict[str, Any]:
    """Where every method starts, in natural scale: no choice made, small rates and penalties."""
    return {
        "activation": np.full(len(ACTIVATIONS), 1 / len(ACTIVATIONS), np.float32),
        "width": np.full(len(WIDTHS), 1 / len(WIDTHS), np.float32),
        "rate": np.full(LAYERS, 0.05, np.float32),
        "pixel": np.full(pixels, 1e-3, np.float32),
        "penalty": np.full(LAYERS - 1, 1e-3, np.float32),
        "dropout": np.float32(0.1),
    }


def data(loaded: datasets.Dataset, train_size: int, val_size: int, seed: int) -> Data:
    """The examples of a seed; what is left tests, where there are no test images."""
    sizes = [train_size, val_size]
    if loaded.test is None:
        sizes.append(len(loaded.train.targets) - sum(sizes))
    train, val, *rest = datasets.split(loaded.train, sizes, seed)

    def rows(batch: Any) -> DataBatch:
        images = jnp.asarray(batch[0], jnp.float32).reshape(len(batch[0]), -1)
        return DataBatch(images, jnp.asarray(batch[1]) % 2)

    return Data(rows(train), rows(val), rows(loaded.test or rest[0]))


def init(pixels: int, key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights of the three layers."""
    sizes = (pixels, WIDTHS[-1], WIDTHS[-1], 2)
    draw = jax.nn.initializers.he_normal()
    return [
        {"w": draw(k, (m, n)), "b": jnp.zeros(n)}
        for k, m, n in zip(jax.random.split(key, LAYERS), sizes[:-1], sizes[1:], strict=True)
    ]


def logits(w: Any, lam: Any, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Scores (n, 2); with dropout where there is a key."""
    open_ = np.arange(WIDTHS[-1]) < np.array(WIDTHS)[:, None]  # of each width, the first units
    gates = lam["width"] @ jnp.asarray(open_, jnp.float32)
    x = images
    for i, layer in enumerate(w[:-1]):
        z = x @ layer["w"] + layer["b"]
        mixed = [act(z) for act in ACTIVATIONS.values()]
        x = jnp.tensordot(lam["activation"], jnp.stack(mixed), 1) * gates
        if key is not None:
            kept = jnp.full(x.shape, jnp.log(1 - lam["dropout"]) - jnp.log(lam["dropout"]))
            draw = jax.random.fold_in(key, i)
            mask = spaces.binary_concrete(kept, draw, TEMPERATURE, hard=True)
            x = x * mask / (1 - lam["dropout"])
    return x @ w[-1]["w"] + w[-1]["b"]


def loss(w: Any, lam: Any, batch: DataBatch, key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy."""
    scores = logits(w, lam, jnp.asarray(batch.inputs), key)
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets).mean()


def problem(train: DataBatch, val: DataBatch) -> BilevelProblem:
    """Its hyperparameters are in natural scale; its training batches are keys."""

    def train_loss(w, lam, key):
        first, *others = (layer["w"] ** 2 for layer in w)
        squares = jnp.stack([jnp.sum(each) for each in others])
        penalty = lam["pixel"] @ first.sum(1) + lam["penalty"] @ squares
        return loss(w, lam, train, key) + penalty

    def val_loss(w, lam, batch):
        del batch
        return loss(w, lam, val)

    def optimizer(lam):
        rates = [{"w": lam["rate"][i], "b": lam["rate"][i]} for i in range(LAYERS)]
        return optax.chain(optax.trace(MOMENTUM), scale_by_tree(rates), optax.scale(-1.0))

    return BilevelProblem(from_optax(train_loss, optimizer), val_loss)
