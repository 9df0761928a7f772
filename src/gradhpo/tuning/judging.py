"""How a trained model does on all of the data."""

import math
from collections.abc import Callable

import jax
import numpy as np

from gradhpo.core import losses
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.source import Resident
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.core.types import Batch, MetricDict
from gradhpo.driver.caches import cached
from gradhpo.tuning.training import Trial

__all__ = ["judged"]


def judged(trial: Trial) -> dict[str, float]:
    """How a trained model does on all validation and test data, `val_loss`, `test_loss`, and what
    the outer loss returns beside it.

    Where the task does not hold its validation data, or every episode begins anew, `val_...` are
    means over the last tenth of the episodes. All are NaN where the last update of the training was
    undone because weights were not finite: the state is then the one before it.
    """
    found = _judged(trial)
    if trial.history.metrics["status"][-1] == Status.NONFINITE_TRAIN_STATE:
        return dict.fromkeys(found, math.nan)
    return found


def _judged(trial: Trial) -> dict[str, float]:
    task = trial.task
    if isinstance(task.val, Resident) and task.problem.begin is None:
        found = _on("val", task, trial.state, task.val.data)
    else:
        last = max(1, len(trial.history.metrics["val_loss"]) // 10)
        found = {
            name: float(np.mean(values[-last:]))
            for name, values in trial.history.metrics.items()
            if name.startswith("val_")
        }
    found = {name: x for name, x in found.items() if not name.endswith("_by_epoch")}  # of curves
    return found if task.test is None else found | _on("test", task, trial.state, task.test)


def _on(side: str, task: Task, state: BilevelState, data: Batch) -> dict[str, float]:
    """The outer loss and its metrics on data of any length, in batches like those of validation.

    Losses are taken for means over the examples of a batch, so the last one, which may be shorter,
    counts by its length.
    """
    n, size = len(jax.tree.leaves(data)[0]), getattr(task.val, "batch_size", EXAMPLES)
    judge = _judge(task.problem)
    lam = task.values(state.hyperparams)
    total: dict[str, float] = {}
    for first in range(0, n, size):
        batch = jax.tree.map(lambda x: x[first : first + size], data)  # noqa: B023
        share = min(size, n - first) / n
        values = judge(state.params, lam, batch, state.model_state)
        for name, value in jax.device_get(values).items():
            total[f"{side}_{name}"] = total.get(f"{side}_{name}", 0.0) + share * float(value)
    return total


EXAMPLES = 256  # at a time, where the task does not say


@cached
def _judge(problem: BilevelProblem) -> Callable[..., MetricDict]:
    def judge(params, lam, batch, model_state):
        value, metrics = losses.judge(problem.outer_loss, params, lam, batch, model_state)
        return {"loss": value, **metrics}

    return jax.jit(judge)
