"""One training of a task, tuned or left alone, and what happened in it."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, report, roll, whole
from gradhpo.core.problem import BilevelProblem, check_window
from gradhpo.core.source import Pool, Resident
from gradhpo.core.start import begin_episode
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.core.types import Batch, Hyper, MetricDict, Scalar
from gradhpo.driver.caches import kept
from gradhpo.driver.failure import OnFailure
from gradhpo.driver.hooks import numbers, scalars
from gradhpo.driver.tune import tune
from gradhpo.utils.gradients import tree_last

__all__ = [
    "History",
    "Hook",
    "Length",
    "Trial",
    "brings",
    "holding",
    "judged",
    "left_alone",
    "trained",
]


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
        self._metrics: list[dict[str, float]] = []
        self._hyperparams = [self.values((state or stored).hyperparams)]

    def __call__(self, episode: int, state: BilevelState) -> None:
        """Keep what this episode left behind."""
        del episode
        self.add(numbers(jax.device_get(state.metadata)), state.hyperparams)

    def add(self, metrics: Mapping[str, float], stored: Hyper) -> None:
        """Keep these, of hyperparameters as a state holds them."""
        self._metrics.append(dict(metrics))
        self._hyperparams.append(self.values(stored))

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """See above."""
        return _columns(self._metrics)

    @property
    def hyperparams(self) -> dict[str, np.ndarray]:
        """See above."""
        return _columns(self._hyperparams)

    @property
    def start(self) -> dict[str, float]:
        """The hyperparameters before the first episode."""
        return self._hyperparams[0]

    def values(self, stored: Hyper) -> dict[str, float]:
        """The numbers of hyperparameters as a state holds them, as in `hyperparams`."""
        values = jax.device_get(self._natural(stored))
        named = scalars("", values)
        return {name.removeprefix("/") or "value": x for name, x in named.items()}


def _columns(rows: Iterable[dict[str, float]]) -> dict[str, np.ndarray]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


class Length(NamedTuple):
    """How long a training is."""

    episodes: int
    steps: int  # T of an episode

    def of(self, task: Task) -> "Length":
        """The same, with the T of a task whose episodes bring their batches."""
        if not brings(task):
            return self
        stored = task.stored
        window = begin_episode(stored.problem, stored.origin(), stored.hyperparams)[1]
        return self if window is None else self._replace(steps=check_window(window))


def brings(task: Task) -> bool:
    """Whether the batches of an episode come with its start."""
    return task.train is None or isinstance(task.train, Pool)


def holding(task: Task, hyperparams: Hyper) -> Task:
    """The task with hyperparameters that are not tuned: in natural scale, anything that its spaces
    may end at, which need not be anything that they may start from."""
    return task.replace(hyperparams=hyperparams, space=None)


class Trial(NamedTuple):
    """One training."""

    task: Task  # as it was trained
    history: History
    state: BilevelState
    hyperparams: Any  # to take home: in natural scale, discrete ones decided
    ended: str  # "": all episodes; "early": by patience; "stopped": by `on_failure`;
    # "interrupted"; "failed"
    cost: Cost
    seconds: float
    error: BaseException | None = None  # that ended it


Hook = Callable[[int, BilevelState], Any]
Method = Callable[[Loop], Estimator]


def trained(
    task: Task,
    method: Method,
    outer: optax.GradientTransformation,
    length: Length,
    *,
    hook: Hook | None = None,
    patience: int = 0,
    state: BilevelState | None = None,
    seed: int = 0,
    on_failure: OnFailure = "skip",
) -> Trial:
    """Train the task and keep what happens; Ctrl-C ends it after the episode, an error at once.

    Raises:
        Exception, KeyboardInterrupt: before the end of the first episode; later they are the
            trial's `error`.

    Args:
        method: From the kind of loop to an estimator.
        outer: The optimizer of the hyperparameters.
        hook: Called after every episode, once the history has it.
        patience: Episodes without a lower validation loss before the training ends; 0: never.
        state: Where to go on from; None: the task's start.
        seed: Of the draws that a problem's `begin` gets; the same for trainings to be compared.
        on_failure: See `gradhpo.tune`.
    """
    history, ended, raised = History(task, state), "", None
    lowest, since = np.inf, 0

    def look(episode: int, state: BilevelState) -> bool:
        nonlocal lowest, since, ended
        history(episode, state)
        if hook is not None:
            hook(episode, state)
        loss = float(state.metadata["val_loss"])
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        if patience and since >= patience:
            ended = "early"
        return not ended

    began = time.monotonic()
    T = None if brings(task) else length.steps
    draws = None if task.problem.begin is None else _draws(seed, state)
    try:
        state = tune(
            task,
            method,
            outer,
            episodes=length.episodes,
            T=T,
            callback=look,
            state=state,
            get_task=draws,
            on_failure=on_failure,
        )
        if not ended and len(history.metrics["val_loss"]) < length.episodes:
            ended = "stopped"
    except (Exception, KeyboardInterrupt) as error:
        if not history.metrics:
            raise
        state, raised = error.state, error  # type: ignore[attr-defined]
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    jax.block_until_ready(state)
    assert state is not None
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(state.hyperparams))
    done = int(state.episode)
    drawn = int(state.drawn) // max(1, done)
    cost = method("scan").cost(drawn, size, episodes=done) if drawn else Cost(0, 0)
    seconds = time.monotonic() - began
    found = task.settled(state.hyperparams)
    return Trial(task, history, state, found, ended, cost, seconds, raised)


def _draws(seed: int, state: BilevelState | None) -> Callable[[], jax.Array]:
    """A key for every episode; of seed 0 those that a run has by itself."""
    key, first = jax.random.key(seed), 0 if state is None else int(state.episode)
    return (jax.random.fold_in(key, episode) for episode in itertools.count(first)).__next__


def left_alone(task: Task, length: Length, hook: Hook | None = None, *, seed: int = 0) -> Trial:
    """The same training with the hyperparameters where they start, on the same batches.

    A space makes no difference: what does not move needs no map.
    """
    task = holding(task, task.hyperparams)
    trial = trained(task, _looking_on(length.steps), STILL, length, hook=hook, seed=seed)
    return trial._replace(cost=Cost(int(trial.state.drawn), 0))


STILL = optax.sgd(0.0)


@kept
def _looking_on(steps: int) -> Method:
    """A method that trains and looks at the validation loss, of a window of so many steps."""

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def method(loop: Loop) -> Estimator:
        look = whole(_validate, loop)

        def estimate(problem, memory, inner, lam, window, origin=None):
            del origin  # seen, so that nobody warns of a start that it does not look back at
            inner = roll(problem.dynamics, inner, lam, window.train, loop=loop)
            loss = look(problem, inner, lam, tree_last(window.val))
            nothing = optax.tree.zeros_like(lam)
            return Estimate(nothing, inner, memory, report(loss, nothing))

        price = lambda size: Cost(steps + 1, 0)  # noqa: E731
        return Estimator(
            init,
            estimate,
            unroll_steps=steps,
            differentiates=False,
            starts=True,
            price=price,
            hosted=loop == "host",
        )

    return method


def _validate(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch) -> Scalar:
    return losses.loss_value(problem.outer_loss, inner.params, lam, batch, inner.model_state)


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


@kept
def _judge(problem: BilevelProblem) -> Callable[..., MetricDict]:
    def judge(params, lam, batch, model_state):
        value, metrics = losses.judge(problem.outer_loss, params, lam, batch, model_state)
        return {"loss": value, **metrics}

    return jax.jit(judge)
