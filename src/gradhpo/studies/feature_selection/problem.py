"""The data with features that say nothing, the bilevel problem, and plain training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo import datasets, spaces
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import DataBatch
from gradhpo.transforms import elastic_net, proximal_sgd

__all__ = ["SPACE", "Data", "data", "init", "judged", "problem", "start", "trained"]

RATE, MOMENTUM = 0.05, 0.9
RETRAINING = 300  # steps from zero that what was found is judged by, and a trial of the searches

SPACE = {"scale": spaces.unconstrained(), "ridge": spaces.log()}  # the scales: see `training`


class Data(NamedTuple):
    """Standardised features (n, real + noise), the real ones first, and labels 0 or 1."""

    train: DataBatch
    val: DataBatch
    test: DataBatch
    real: int


def data(loaded: datasets.Dataset, sizes: tuple[int, int, int], noise: int, seed: int) -> Data:
    """Rows of a seed for training, validation and test, and the noise features of that seed."""
    draw = np.random.default_rng(seed)
    rows = draw.permutation(len(loaded.train.targets))[: sum(sizes)]
    x = np.asarray(loaded.train.inputs, np.float32)[rows]
    real = x.shape[1]
    copies = [draw.permutation(x[:, j]) for j in draw.integers(0, real, noise)]
    x = np.concatenate([x, np.stack(copies, 1)], 1) if noise else x
    known = x[: sizes[0]]
    x = (x - known.mean(0)) / np.maximum(known.std(0), 0.05)
    ends = np.cumsum(sizes)[:-1]
    labels = np.split(np.asarray(loaded.train.targets, np.float32)[rows], ends)
    train, val, test = (
        DataBatch(*map(jnp.asarray, pair)) for pair in zip(np.split(x, ends), labels, strict=True)
    )
    return Data(train, val, test, real)


def start(features: int) -> dict[str, Any]:
    """Where the hyperparameters start: every feature in use."""
    return {"scale": np.ones(features, np.float32), "ridge": np.float32(0.01)}


def init(features: int) -> dict[str, jax.Array]:
    """Weights of zero."""
    return {"w": jnp.zeros(features), "b": jnp.zeros(())}


def loss(w: Any, scale: Any, batch: DataBatch) -> jax.Array:
    """Mean cross-entropy."""
    scores = jnp.asarray(batch.inputs) @ (scale * w["w"]) + w["b"]
    return optax.sigmoid_binary_cross_entropy(scores, jnp.asarray(batch.targets)).mean()


def problem(train: DataBatch, val: DataBatch) -> BilevelProblem:
    """Batches are ignored: every step sees all examples."""

    def train_loss(w, lam, batch):
        del batch
        return loss(w, lam["scale"], train) + lam["ridge"] * jnp.sum(w["w"] ** 2)

    def val_loss(w, lam, batch):
        del batch
        return loss(w, lam["scale"], val)

    return BilevelProblem(from_optax(train_loss, optax.sgd(RATE, MOMENTUM)), val_loss)


@jax.jit
def trained(train: DataBatch, scale: jax.Array, lasso: Any, ridge: Any) -> Any:
    """Weights after training from zero with `lasso |w|_1 + ridge |w|^2`, by proximal steps."""
    outer = proximal_sgd(RATE, {"w": elastic_net(lasso, 2 * ridge), "b": None}, momentum=MOMENTUM)
    start = init(len(scale))

    def step(state, _):
        w, slots = state
        return outer.apply(jax.grad(loss)(w, scale, train), slots, w), None

    return lax.scan(step, (start, outer.init(start)), length=RETRAINING)[0][0]


@jax.jit
def judged(w: Any, scale: jax.Array, batch: DataBatch) -> tuple[jax.Array, jax.Array]:
    """`(mean cross-entropy, accuracy)`."""
    scores = jnp.asarray(batch.inputs) @ (scale * w["w"]) + w["b"]
    return loss(w, scale, batch), jnp.mean((scores > 0) == (jnp.asarray(batch.targets) > 0.5))
