"""The bilevel problem of hyper-cleaning and the methods that are compared on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.algorithms.registry import METHODS as REGISTERED
from gradhpo.core.delay import update_every
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import DataBatch
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse
from gradhpo.studies.hyper_cleaning.network import Parts, logits, patches
from gradhpo.studies.shared.solvers import unjudged_neumann

__all__ = ["METHODS", "Examples", "Weights", "estimator", "examples", "problem", "score"]

RATE, MOMENTUM = 0.1, 0.9
TERMS = 5  # of the Neumann series, with the inner rate as its step

METHODS = ("fixed", "t1t2", "implicit_neumann", "greedy", "one_step", "hyperdistill", "reverse")
"""The first four are the paper's; `one_step` and `hyperdistill` move lam after every step."""


Weights = Callable[[jax.Array], jax.Array]
"""Hyperparameters (n,) to the weights of the examples."""


class Examples(NamedTuple):
    """Images in the form that the network reads, and their labels (n,)."""

    inputs: Parts
    labels: jax.Array


def examples(data: DataBatch) -> Examples:
    """Images (n, side, side, channels) and labels (n,)."""
    return Examples(patches(jnp.asarray(data.inputs, jnp.float32)), jnp.asarray(data.targets))


def problem(train: Examples, val: Examples, weights: Weights) -> BilevelProblem:
    """The mean of weights(lam)_i times the loss of example i in training, the plain mean in
    validation. Batches are ignored: every step sees all examples."""

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del batch
        return jnp.mean(weights(lam) * _losses(params, train))

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del lam, batch
        return jnp.mean(_losses(params, val))

    return BilevelProblem(from_optax(train_loss, optax.sgd(RATE, MOMENTUM)), val_loss)


def estimator(method: str, T: int, gamma: float) -> Estimator:
    """The method with which lam moves once in T steps, or after each of them."""
    if method == "fixed":
        return reverse(T, truncate=0)  # the direct term alone, which is zero here
    if method == "t1t2":
        return update_every(one_step(), T)
    if method == "implicit_neumann":
        return implicit(T, unjudged_neumann(TERMS, RATE))
    if method == "greedy":
        return greedy(gamma, T)
    if method == "reverse":
        return reverse(T)
    own = {"gamma": gamma} if method == "hyperdistill" else {}
    return REGISTERED[method].make(**own, inner_optimizer=optax.identity()).estimator()


@jax.jit
def score(params: Any, data: Examples) -> tuple[jax.Array, jax.Array]:
    """`(mean cross-entropy, accuracy)`."""
    right = logits(params, data.inputs).argmax(-1) == data.labels
    return jnp.mean(_losses(params, data)), jnp.mean(right)


def _losses(params: Any, data: Examples) -> jax.Array:
    scores = logits(params, data.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(scores, data.labels)
