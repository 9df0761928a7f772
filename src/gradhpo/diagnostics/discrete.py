"""What is lost when relaxed hyperparameters are taken home as discrete ones."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import roll
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper

__all__ = ["DiscreteGap", "discrete_gap"]


class DiscreteGap(NamedTuple):
    """Validation losses after the same training."""

    relaxed: float  # with the hyperparameters as the losses saw them during the run
    discrete: float  # with those that are taken home
    settled: Hyper  # the latter, in natural scale

    @property
    def gap(self) -> float:
        """What deciding costs; above 0 if the discrete setting is worse."""
        return self.discrete - self.relaxed


def discrete_gap(task: Task, hyperparams: Hyper, steps: int, *, key: Any = None) -> DiscreteGap:
    """Train the task twice from its start, on the same batches: relaxed, and decided.

    Args:
        task: With a `space` that has integers or categoricals.
        hyperparams: As a state holds them, `state.hyperparams`.
        steps: Training steps; losses are means over as many validation batches.
        key: The draw for `problem.begin`; None: `jax.random.key(0)`.

    Cost: two trainings.

    Raises:
        ValueError: there is nothing discrete.

    >>> from gradhpo import BilevelProblem, Task, from_update, spaces
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: jnp.sum(lam * jnp.array([1.0, 3.0]))),
    ...     lambda w, lam, batch: (w - 3) ** 2,
    ... )
    >>> data, even = lambda: 0.0, jnp.array([0.5, 0.5])
    >>> task = Task(problem, 0.0, even, data, data, space=spaces.categorical(2))
    >>> got = discrete_gap(task, jnp.log(jnp.array([0.25, 0.75])), steps=1)
    >>> print(round(got.relaxed, 2), got.discrete, got.settled)
    0.25 0.0 [0. 1.]
    """
    spaces = task.declared
    if spaces is None or not spaces.discrete:
        raise ValueError(
            "discrete_gap compares relaxed with discrete hyperparameters: give the task a space= "
            "with spaces.integer or spaces.categorical."
        )

    # Not a static argument of `jit`, which would keep the problem, and its data, for good.
    program = jax.jit(partial(_trained, task.problem))

    def trained(lam: Hyper) -> float:
        inner, window = task.replace(space=None, hyperparams=lam).begin(steps, key)
        return float(program(inner, lam, window))

    settled = spaces.settle(hyperparams)
    return DiscreteGap(trained(spaces.value(hyperparams)), trained(settled), settled)


def _trained(problem: BilevelProblem, inner: InnerState, lam: Hyper, window: Window) -> jax.Array:
    end = roll(problem.dynamics, inner, lam, window.train)

    def judge(batch):
        return losses.judge(problem.outer_loss, end.params, lam, batch, end.model_state)[0]

    return jnp.mean(jax.lax.map(judge, window.val))
