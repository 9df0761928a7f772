"""How the problems of the zoo are put together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.dynamics import Dynamics, InnerState
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.step import strengthen
from gradhpo.core.types import Hyper

__all__ = ["Problem", "ProblemAt", "build", "numbers"]

Problem = tuple[BilevelProblem, InnerState, Hyper, Window]
ProblemAt = Callable[[int], Problem]


def numbers(seed: int) -> Callable[..., jax.Array]:
    """`draw(*shape)`: standard normal numbers, the same for every dtype."""
    generator = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(generator.standard_normal(shape))


def build(dynamics: Dynamics, outer_loss: Any, params: Any, lam: Hyper, *window: Any) -> Problem:
    params, lam = strengthen((params, lam))
    problem = BilevelProblem(dynamics, outer_loss)
    return problem, dynamics.init(params, lam), lam, Window(*window)
