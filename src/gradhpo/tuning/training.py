"""One training of a task, tuned or left alone, and what happened in it."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, report, roll, whole
from gradhpo.core.problem import BilevelProblem, check_window
from gradhpo.core.source import Pool
from gradhpo.core.start import begin_episode
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.core.types import Batch, Hyper, Scalar
from gradhpo.driver.caches import cached
from gradhpo.driver.failure import OnFailure
from gradhpo.driver.hooks import StopRun
from gradhpo.driver.identity import digest_of
from gradhpo.driver.tune import tune
from gradhpo.tuning.history import History
from gradhpo.tuning.journal import LogRow
from gradhpo.tuning.places import NOWHERE, Place
from gradhpo.utils.gradients import tree_last

__all__ = [
    "Hook",
    "Length",
    "Trial",
    "brings",
    "holding",
    "left_alone",
    "trained",
]


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
    seconds: float  # of all processes that went on with it
    error: BaseException | None = None  # that ended it
    earlier: float = 0.0  # of the seconds, those of processes before this one


Hook = Callable[[LogRow], Any]
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
    place: Place = NOWHERE,
) -> Trial:
    """Train the task and keep what happens; Ctrl-C ends it after the episode, an error at once.

    Raises:
        Exception, KeyboardInterrupt: before the end of the first episode; later they are the
            trial's `error`.

    Args:
        method: From the kind of loop to an estimator.
        outer: The optimizer of the hyperparameters.
        hook: Called after every episode with what it left behind; for a training that goes on, with
            the earlier ones first.
        patience: Episodes without a lower validation loss before the training ends; 0: never.
        state: Where to go on from; None: the task's start.
        seed: Of the draws that a problem's `begin` gets; the same for trainings to be compared.
        on_failure: See `gradhpo.tune`.
        place: Where it is kept; one that has been there goes on, one that was done is read.
    """
    raised = None
    stops = on_failure == "stop"
    look = _Look(task, state, hook or _nothing, patience, stops, place)
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
            checkpoint=place.checkpoints(test_data=digest_of(task.test)[:16]),
        )
        short = len(look.history.rows) < length.episodes
        ended = "early" if look.early else "stopped" if short else ""
    except (Exception, KeyboardInterrupt) as error:
        if not look.history.rows:
            raise
        state, raised = error.state, error  # type: ignore[attr-defined]
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    jax.block_until_ready(state)
    assert state is not None
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(state.hyperparams))
    done = int(state.episode)
    drawn = int(state.drawn) // max(1, done)
    cost = method("scan").cost(drawn, size, episodes=done) if drawn else Cost(0, 0)
    found = task.settled(state.hyperparams)
    seconds, earlier = look.seconds, look.earlier
    return Trial(task, look.history, state, found, ended, cost, seconds, raised, earlier)


class _Look:
    """What looks on at a training: the history, the journal of its place, a hook, and patience.

    Attributes:
        early: Whether patience has come to its end.
        earlier: Seconds that the training took in processes before this one.
    """

    def __init__(
        self,
        task: Task,
        state: BilevelState | None,
        hook: Hook,
        patience: int,
        stops: bool,
        place: Place,
    ):
        self.history, self._journal = History(task, state), place.episodes()
        self._hook, self._begun = hook, place.begun
        self._patience, self._stops = patience, stops
        self.early, self.earlier, self._began = False, 0.0, time.monotonic()
        self._lowest, self._since = math.inf, 0

    def __call__(self, episode: int, state: BilevelState) -> bool:
        self._begun()  # what is written from now on, is of this run; if that fails, nothing is
        self.history(episode, state)
        row = self.history.rows[-1]._replace(seconds=self.seconds)
        self._journal.add(row)
        self._see(row)
        return not self.early

    def resumed(self, state: BilevelState) -> None:
        """The training goes on from this state: what is known of later episodes comes again."""
        rows = self._journal.rows
        self._journal.cut(sum(row.step <= int(state.step) for row in rows))
        if rows:
            self.earlier = rows[-1].seconds
            self._begun()
        for row in rows:
            self.history.rows.append(row)
            self._see(row)
        if self.early or (self._stops and _rejected(state)):
            raise StopRun

    @property
    def seconds(self) -> float:
        """That the training has taken."""
        return self.earlier + time.monotonic() - self._began

    def _see(self, row: LogRow) -> None:
        self._hook(row)
        loss = row.metrics["val_loss"]
        lower = loss < self._lowest
        self._lowest, self._since = (loss, 0) if lower else (self._lowest, self._since + 1)
        self.early = self.early or 0 < self._patience <= self._since


def _rejected(state: BilevelState) -> bool:
    """Whether an update of the training has been, by which one with `on_failure="stop"` is over."""
    counts = np.asarray(state.counts)
    return any(code.rejects and counts[code] for code in Status)


def _nothing(row: LogRow) -> None:
    """Where nobody else looks on."""


def _draws(seed: int, state: BilevelState | None) -> Callable[[], jax.Array]:
    """A key for every episode; of seed 0 those that a run has by itself."""
    key, first = jax.random.key(seed), 0 if state is None else int(state.episode)
    return (jax.random.fold_in(key, episode) for episode in itertools.count(first)).__next__


def left_alone(
    task: Task,
    length: Length,
    hook: Hook | None = None,
    *,
    seed: int = 0,
    place: Place = NOWHERE,
) -> Trial:
    """The same training with the hyperparameters where they start, on the same batches.

    A space makes no difference: what does not move needs no map.
    """
    task = holding(task, task.hyperparams)
    method = _looking_on(length.steps)
    trial = trained(task, method, STILL, length, hook=hook, seed=seed, place=place)
    return trial._replace(cost=Cost(int(trial.state.drawn), 0))


STILL = optax.sgd(0.0)


@cached
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
