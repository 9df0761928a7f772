"""How the problems of the zoo are put together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.dynamics import Dynamics
from gradhpo.core.problem import Begin, BilevelProblem
from gradhpo.core.source import InOrder
from gradhpo.core.step import strengthen
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper, PyTree

__all__ = ["ProblemAt", "build", "numbers"]

ProblemAt = Callable[[int], Task]
"""A problem with the data of so many inner steps."""


def numbers(seed: int) -> Callable[..., jax.Array]:
    """`draw(*shape)`: standard normal numbers, the same for every dtype."""
    generator = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(generator.standard_normal(shape))


def build(
    dynamics: Dynamics,
    outer_loss: Any,
    params: Any,
    lam: Hyper,
    train: Any,
    val: Any,
    *,
    begin: Begin | None = None,
    model_state: PyTree = (),
) -> Task:
    """The task of a problem and the batches of its steps."""
    params, lam, model_state = strengthen((params, lam, model_state))
    problem = BilevelProblem(dynamics, outer_loss, begin=begin)
    return Task(problem, params, lam, InOrder(train), InOrder(val), model_state=model_state)
