"""What every episode of a run has left behind."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from gradhpo.core.state import BilevelState
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper
from gradhpo.driver.hooks import numbers, scalars
from gradhpo.tuning.journal import LogRow

__all__ = ["History"]


class History:
    """A callback that keeps the metrics and the hyperparameters of every episode.

    Args:
        task: What is tuned.
        state: Where the run goes on from; None: the task's start.

    Attributes:
        metrics: By name, an array with a number for every episode: losses, norms, status, and what
            the losses return beside their values.
        hyperparams: By name, an array with a number at the start and after every episode, in the
            scale of `task.natural` or of the task's spaces; of a leaf with several numbers their
            mean, least and largest.
        start: The hyperparameters before the first episode, by the same names.
        rows: The episodes.

    >>> import jax.numpy as jnp
    >>> from gradhpo import BilevelProblem, InOrder, Task, from_update, one_step, tune
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    ... )
    >>> task = Task(problem, 2.0, 0.5, InOrder(jnp.ones(6)), InOrder(jnp.zeros(6)))
    >>> history = History(task)
    >>> state = tune(task, one_step(), episodes=2, T=3, lr_hyper=0.01, callback=history)
    >>> history.metrics["val_loss"].shape, history.hyperparams["value"].shape
    ((2,), (3,))
    """

    def __init__(self, task: Task, state: BilevelState | None = None):
        stored = task.stored
        self._natural = stored.natural or (lambda lam: lam)
        self.start = self.values((state or stored).hyperparams)
        self.rows: list[LogRow] = []

    def __call__(self, episode: int, state: BilevelState) -> None:
        """Keep what this episode left behind."""
        del episode
        metrics = numbers(jax.device_get(state.metadata))
        self.rows.append(LogRow(int(state.step), metrics, self.named(state.hyperparams)))

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """See above."""
        return _columns(row.metrics for row in self.rows)

    @property
    def hyperparams(self) -> dict[str, np.ndarray]:
        """See above."""
        return _columns([self.start, *(_short(row.hyperparams) for row in self.rows)])

    def values(self, stored: Hyper) -> dict[str, float]:
        """The numbers of hyperparameters as a state holds them, as in `hyperparams`."""
        return _short(self.named(stored))

    def named(self, stored: Hyper) -> dict[str, float]:
        """The same, by the names that they have in a log."""
        return scalars(LOGGED, jax.device_get(self._natural(stored)))


LOGGED = "hyperparams"


def _short(named: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(LOGGED).removeprefix("/") or "value": x for name, x in named.items()}


def _columns(rows: Iterable[dict[str, float]]) -> dict[str, np.ndarray]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
