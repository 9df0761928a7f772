"""Logistic regression with a penalty per feature: losses, parts of the data, the exact answer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo import datasets
from gradhpo.core.problem import Window
from gradhpo.core.types import DataBatch

__all__ = ["Exact", "Split", "cut", "exact", "logistic", "split", "train_loss", "val_loss"]

SMALLEST_SCALE = 0.1  # a feature is enlarged at most tenfold
VAL_PART = 1 / 3  # of the training file, for a data set without an official validation part


class Split(NamedTuple):
    """Scaled features (n, P), float32, and labels -1 or 1."""

    train: DataBatch
    val: DataBatch
    test: DataBatch | None


class Exact(NamedTuple):
    """The outer problem at one lam, inner problem solved; float64."""

    weights: np.ndarray
    hypergrad: np.ndarray
    value: float  # L_val at these weights


def logistic(w, x, y):
    """Mean logistic loss of labels -1 and 1; JAX and NumPy.

    >>> print(logistic(jnp.zeros(2), jnp.ones((3, 2)), jnp.ones(3)))
    0.6931472
    """
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def train_loss(w, lam, batch):
    """Logistic loss plus `exp(lam_k) w_k^2 / 2` for every feature."""
    return logistic(w, batch["x"], batch["y"]) + jnp.sum(jnp.exp(lam) * w**2) / 2


def val_loss(w, lam, batch):
    del lam
    return logistic(w, batch["x"], batch["y"])


def split(data: datasets.Dataset) -> Split:
    """The official parts where there are some; features divided by their root mean square."""
    train, val, test = data.train, data.validation, data.test
    if val is None:
        held_out = round(len(train.targets) * VAL_PART)
        train, val = datasets.split(train, [len(train.targets) - held_out, held_out], 0)
    scale = np.sqrt(np.mean(np.square(train.inputs, dtype=np.float64), axis=0))
    scale = np.maximum(scale, SMALLEST_SCALE)

    def scaled(part: DataBatch) -> DataBatch:
        x, y = np.asarray(part.inputs) / scale, 2 * np.asarray(part.targets) - 1
        return DataBatch(x.astype(np.float32), y.astype(np.float32))

    return Split(scaled(train), scaled(val), None if test is None else scaled(test))


def cut(data: Split, batch_size: int, seed: int) -> Window:
    """The examples of either side, shuffled, as parts of `batch_size`; the last few are left out.

    Every leaf has the part as its leading axis, and `index` is its number, which SABA reads:
    batches are drawn by gathering whole parts.
    """

    def parts(part: DataBatch, generator: np.random.Generator) -> dict[str, Any]:
        n, order = len(part.targets) // batch_size, generator.permutation(len(part.targets))
        x, y = (np.asarray(a)[order[: n * batch_size]] for a in part)
        shapes = (n, batch_size, x.shape[1]), (n, batch_size)
        arrays = {"x": x.reshape(shapes[0]), "y": y.reshape(shapes[1]), "index": np.arange(n)}
        return jax.tree.map(jnp.asarray, arrays)

    generator = np.random.default_rng(seed)
    return Window(parts(data.train, generator), parts(data.val, generator))


def exact(data: Split, lam: Any, weights: Any = None) -> Exact:
    """Newton's method on the whole training set, then equation (9) with the dense Hessian.

    Args:
        lam: (P,).
        weights: Where to start; by default at zero.

    >>> x, y = np.eye(2, dtype=np.float32), np.array([1.0, -1.0], np.float32)
    >>> data = Split(DataBatch(x, y), DataBatch(x, y), None)
    >>> exact(data, np.zeros(2)).weights.round(3)
    array([ 0.222, -0.222])
    """
    (x, y), (x_val, y_val) = (tuple(np.asarray(a, np.float64) for a in p) for p in data[:2])
    penalty = np.exp(np.asarray(lam, np.float64))
    w = np.zeros(len(penalty)) if weights is None else np.asarray(weights, np.float64)
    gradient, hessian = _newton(x, y, w, penalty)
    for _ in range(100):
        if np.abs(gradient).max() < 1e-12:
            break
        step, size, before = np.linalg.solve(hessian, gradient), 1.0, _loss(x, y, w, penalty)
        while _loss(x, y, w - size * step, penalty) > before + 1e-12 and size > 1e-6:
            size /= 2
        w = w - size * step
        gradient, hessian = _newton(x, y, w, penalty)
    margin = y_val * (x_val @ w)
    alpha = -(x_val.T @ (y_val * _sigmoid(-margin))) / len(y_val)
    u = np.linalg.solve(hessian, alpha)
    return Exact(w, -u * penalty * w, float(np.mean(np.logaddexp(0, -margin))))


def _newton(x, y, w, penalty) -> tuple[np.ndarray, np.ndarray]:
    p = _sigmoid(-y * (x @ w))
    gradient = -(x.T @ (y * p)) / len(y) + penalty * w
    return gradient, (x.T * (p * (1 - p))) @ x / len(y) + np.diag(penalty)


def _loss(x, y, w, penalty) -> float:
    return float(np.mean(np.logaddexp(0, -y * (x @ w))) + penalty @ w**2 / 2)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(z / 2)) / 2
