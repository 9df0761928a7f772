"""Problems for methods that ask for an optimizer or hyperparameters of a certain kind."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.task import Task
from gradhpo.testing._build import build
from gradhpo.transforms import reversible_sgd

__all__ = ["run_backwards", "three_pieces"]


def _quadratics(make_optimizer: Any, lam: Any, steps: int) -> Task:
    x, v = jnp.asarray(np.random.default_rng(5).normal(size=(2, steps, 3)))
    dynamics = from_optax(lambda w, lam, x: jnp.sum((w - x) ** 2) / 2, make_optimizer)

    def outer_loss(w, lam, v):
        return jnp.sum((w - v) ** 2)

    return build(dynamics, outer_loss, jnp.array([1.0, -2.0, 0.5]), jnp.asarray(lam), x, v)


def run_backwards(steps: int) -> Task:
    """The logarithm of the learning rate of an optimizer that can be run backwards."""
    return _quadratics(lambda lam: reversible_sgd(jnp.exp(lam), momentum=0.5), -1.5, steps)


def three_pieces(steps: int) -> Task:
    """A learning rate for each of the first three steps."""
    rates = [0.3, 0.2, 0.1]
    return _quadratics(
        lambda lam: optax.sgd(lambda count: lam[jnp.minimum(count, 2)]), rates, steps
    )
