"""The network, the schedule of its training as hyperparameters, and training with a schedule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.studies.shared.reversible import Rows, cross_entropy, draw, on_all, on_rows, started
from gradhpo.transforms import reversible_sgd
from gradhpo.transforms.reversible import Reversible

__all__ = ["Schedule", "curve", "initial", "inner_optimizer", "judge", "problem_of", "start"]

LAYERS = (784, 50, 50, 50, 10)
BATCH = 200


class Schedule(NamedTuple):
    """The hyperparameters, unconstrained; a column per leaf of the network."""

    log_rate: jax.Array  # (steps, 8)
    logit_momentum: jax.Array  # (steps, 8)
    log_scale: jax.Array  # (8,)


def initial(steps: int, momentum: float) -> Schedule:
    """Where the paper starts."""
    kinds = 2 * (len(LAYERS) - 1)
    logit = np.log(momentum / (1 - momentum))
    table = (steps, kinds)
    return Schedule(jnp.full(table, -1.0), jnp.full(table, logit), jnp.full(kinds, -3.0))


def inner_optimizer(lam: Schedule) -> Reversible:
    """`reversible_sgd` with the rates and momenta of a schedule."""
    return reversible_sgd(
        lambda t: list(jnp.exp(lam.log_rate[t])),
        lambda t: list(jax.nn.sigmoid(lam.logit_momentum[t])),
    )


def start(
    data: Rows, log_scale: jax.Array, steps: int, key: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """New initial weights and new batches, as row numbers (steps, BATCH), for one run."""
    return draw(key, LAYERS, log_scale, (steps, BATCH), len(data.train.targets))


def problem_of(data: Rows, steps: int) -> BilevelProblem:
    """The loss on all training examples after a run from new weights, exp(log_scale) noise."""

    def begin(params, lam, key):
        del params
        return started(*start(data, lam.log_scale, steps, key))

    dynamics = from_optax(on_rows(data.train), inner_optimizer)
    return BilevelProblem(dynamics, on_all(data.train), begin=begin)


@jax.jit
def _train(data: Rows, lam: Schedule, key: jax.Array):
    """`(losses on the three parts, training loss by step)` of a run in floating point."""
    dynamics = from_optax(on_rows(data.train), inner_optimizer)
    weights, index = start(data, lam.log_scale, len(lam.log_rate), key)

    def body(inner, index):
        loss = cross_entropy(inner.params, data.train)
        return dynamics.step(inner, lam, index), loss

    inner, losses = lax.scan(body, dynamics.init(weights, lam), index)
    ends = jnp.stack([cross_entropy(inner.params, part) for part in data])
    return ends, jnp.append(losses, ends[0])


def judge(data: Rows, lam: Schedule, keys: list[jax.Array]) -> np.ndarray:
    """Mean losses over fresh seeds: training, validation, test."""
    return np.mean([_train(data, lam, key)[0] for key in keys], axis=0)


def curve(data: Rows, lam: Schedule, key: jax.Array) -> np.ndarray:
    """The training loss before every step and after the last, (steps + 1,)."""
    return np.asarray(_train(data, lam, key)[1], np.float64)
