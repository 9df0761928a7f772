"""The methods of the study `meta_weight_net`, and one run of one of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import fetch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.types import DataBatch
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.virtual import virtual_step
from gradhpo.examples.mnist import init, logits, val_loss
from gradhpo.meta.weights import MetaWeightNet
from gradhpo.studies.shared.images import scorer

__all__ = ["METHODS", "NET", "UNTOUCHED", "Method", "Run", "draws", "train"]

RATE, MOMENTUM = 0.3, 0.9  # the rate of plain SGD, and that which momentum has in the end
NET = MetaWeightNet()


class Method(NamedTuple):
    """How the hyperparameters of a run move, and what the weights are trained with."""

    estimator: Estimator
    momentum: bool
    outer: float  # rate of Adam
    weighted: bool = True  # False: the plain mean of the losses


def _virtual(estimator: Estimator) -> Estimator:
    """Looking ahead by plain SGD, which moves the weights as far as momentum does in the end."""
    return virtual_step(estimator, optax.sgd(RATE))


UNTOUCHED = Method(first_order(), momentum=False, outer=0.0, weighted=False)
METHODS = {
    "one_step": Method(one_step(), momentum=False, outer=1e-4),
    "one_step_momentum": Method(one_step(), momentum=True, outer=1e-4),
    "one_step_virtual": Method(_virtual(one_step()), momentum=True, outer=1e-4),
    "hyperdistill_virtual": Method(
        _virtual(hyperdistill(0.9, theta=1.0)), momentum=True, outer=1e-4
    ),
    "trap": Method(one_step(), momentum=True, outer=1e-3),
    "trap_virtual": Method(_virtual(one_step()), momentum=True, outer=1e-3),
}


class Run(NamedTuple):
    """A run as seen at some steps, evenly spaced; the last one is its end."""

    test: np.ndarray  # (points, 2): mean cross-entropy, accuracy
    val: np.ndarray  # the same
    weights: np.ndarray  # (points, training examples)
    hyperparams: Any  # the weights of V at the end


def draws(seed: int, sizes: tuple[int, int], batch_size: int, steps: int) -> Window:
    """Rows of the batches of a run, (steps, batch size): the same for every method."""
    rng = np.random.default_rng(seed)
    return Window(*(rng.integers(0, n, (steps, min(batch_size, n)), dtype=np.int32) for n in sizes))


def train(method: Method, seed: int, data: tuple[DataBatch, ...], rows: Window, points: int) -> Run:
    """Train once through `rows`; V moves after every step.

    Args:
        data: To train on, clean ones and those to test on: images (n, side, side, channels) and
            labels (n,), on the device.
        rows: From `draws`, of a number of steps that `points` divides.
    """
    pool = Window(*data[:2])
    seen = jax.tree.map(lambda x: x.reshape(points, -1, 1, x.shape[-1]), rows)
    first = fetch(pool, jax.tree.map(lambda x: x[0, 0], seen))
    outer, lam = optax.adam(method.outer), NET.init(jax.random.key(seed))
    params = init(seed, data[0].inputs)
    state = init_state(_problem(method), method.estimator, outer, params, lam, first)
    scores, weights = [], []
    for k in range(points):
        state = _steps(method, state, Window(seen.train[k], seen.val[k]), pool)
        scores.append([SCORE(state.params, part) for part in (data[2], data[1])])
        weights.append(_weights(state.params, state.hyperparams, pool.train))
    test, val = np.moveaxis(np.array(scores), 1, 0)
    return Run(test, val, np.array(weights), state.hyperparams)


SCORE = scorer(logits)


@partial(jax.jit, static_argnums=0)
def _steps(method: Method, state: BilevelState, rows: Window, pool: Window) -> BilevelState:
    step = bilevel_step(method.estimator, optax.adam(method.outer))

    def body(state, rows):
        return step(_problem(method), state, fetch(pool, rows)), None

    return lax.scan(body, state, rows)[0]


def _problem(method: Method) -> BilevelProblem:
    rate = RATE * (1 - MOMENTUM) if method.momentum else RATE
    optimizer = optax.sgd(rate, MOMENTUM if method.momentum else None)
    loss = _train_loss if method.weighted else val_loss
    return BilevelProblem(from_optax(loss, optimizer), val_loss)


def _train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
    return NET.loss(lam, _losses(params, batch))


def _losses(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)


@jax.jit
def _weights(params: Any, lam: Any, data: Any) -> jax.Array:
    return NET(lam, _losses(params, data))
