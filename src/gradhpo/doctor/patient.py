"""The episode that all experiments look at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.inspect import check_problem
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.start import Origin
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper, Loop
from gradhpo.diagnostics.episode import loop_for
from gradhpo.utils.gradients import tree_last

__all__ = ["Make", "Patient", "patient_of"]


Make = Callable[[], Task]


class Patient(NamedTuple):
    """A task, and the first steps of its training."""

    make: Make  # a fresh one: sources that are functions at their first batch
    task: Task
    problem: BilevelProblem
    inner: InnerState  # s_0
    lam: Hyper  # as stored
    window: Window  # of T steps
    origin: Origin
    steps: int  # T
    loop: Loop  # over them

    @property
    def batch(self) -> Window:
        """The last batches of the window."""
        return tree_last(self.window)


def patient_of(make: Make, steps: int) -> Patient:
    """Draw the batches and make the start.

    Raises:
        TypeError, ValueError: the task has no episode of so many steps; see `Task.begin`.
    """
    task = make()
    stored = task.stored
    inner, window = stored.begin(steps)
    lam: Any = jax.tree.map(jax.numpy.asarray, stored.hyperparams)
    check_problem(stored.problem, inner, lam, window)
    loop = loop_for(stored.problem, inner, lam, window)
    return Patient(make, task, stored.problem, inner, lam, window, stored.origin(), steps, loop)
