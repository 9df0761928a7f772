"""What a class runs by: the problem that it makes of its losses, and the setup of the driver."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gradhpo.core.dynamics import from_optax, from_update
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.core.types import LossFn
from gradhpo.driver.caches import cached
from gradhpo.driver.identity import plain_settings
from gradhpo.driver.setup import Setup

__all__ = ["initializer", "problem_of", "setup_of"]


def problem_of(
    optimizer: Any, train_loss: LossFn | None, val_loss: LossFn | None
) -> BilevelProblem:
    """The problem that a class and its losses make; `init` does not know them yet."""
    if optimizer.update_fn is not None:
        dynamics = from_update(optimizer.update_fn)
    else:
        dynamics = from_optax(train_loss, optimizer.inner_optimizer)  # type: ignore[arg-type]
    return BilevelProblem(dynamics, val_loss, train_loss, optimizer.begin)  # type: ignore[arg-type]


@cached
def setup_of(optimizer: Any, train_loss: LossFn, val_loss: LossFn) -> Setup:
    """One for equal optimizers and the same losses."""
    return Setup(
        type(optimizer).__name__,
        problem_of(optimizer, train_loss, val_loss),
        optimizer.method,
        optimizer.outer,
        optimizer.estimation_interval,
        optimizer.loop,
        optimizer.strict,
        optimizer.remarks,
        plain_settings(optimizer),
    )


@cached
def initializer(optimizer: Any) -> Callable[..., BilevelState]:
    """`(params, hyperparams, window, model_state=) -> state`, jitted: helpers such as zeros compile
    as one."""
    problem = problem_of(optimizer, None, None)
    return jax.jit(functools.partial(init_state, problem, optimizer.method(), optimizer.outer))
