"""`gradhpo tune`: a task of one's own by a method, beside the same training left alone."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gradhpo.core.estimator import Cost
from gradhpo.core.state import BilevelState
from gradhpo.driver.hooks import Hook, log_to
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.comparing import OUTER, Training, at, by_search, lowest
from gradhpo.tuning.config import TaskConfig, TuneConfig
from gradhpo.tuning.directory import clear, events
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.searches import SEARCHES, require_optuna
from gradhpo.tuning.target import Target, check_begins_anew, load
from gradhpo.tuning.training import (
    History,
    Length,
    Trial,
    holding,
    judged,
    left_alone,
    trained,
)
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MetricLogger,
    MultiLogger,
    TensorBoardLogger,
)

__all__ = ["ANEW", "UNTUNED", "Outcome", "Seed", "Tuned", "target_of", "tune_target"]

UNTUNED, ANEW = "untuned", "trained anew"


class Outcome(NamedTuple):
    """A training of one seed and how it ended, by the whole of the data."""

    trial: Trial
    judged: dict[str, float]  # val_loss, test_loss, and what the loss returns beside


class Seed(NamedTuple):
    """All trainings of one seed."""

    start: dict[str, float]  # the hyperparameters, in natural scale
    outcomes: dict[str, Outcome]  # by the name of the training; an early end may leave some out

    def whole(self, names: Collection[str]) -> bool:
        """Whether there are these trainings, none of them cut off."""
        outcomes = self.outcomes
        cut_off = any(each.trial.error is not None for each in outcomes.values())
        return not cut_off and set(names) <= outcomes.keys()


class Tuned(NamedTuple):
    """All trainings of a command."""

    seeds: list[Seed]  # that have been tuned at all
    seconds: float
    error: BaseException | None  # that ended it early


def tune_target(config: TuneConfig, out: Path, progress: Progress = silent) -> Tuned:
    """Load the task, and train it for every seed.

    Args:
        out: An existing directory, for the logs of every episode.
        progress: Told of every training that is done.

    Returns:
        What has been tuned; where something has been before an error or Ctrl-C, that is
        `error`.

    Raises:
        TypeError, ValueError: the task, the method or a setting is wrong.
        ModuleNotFoundError: there is no such module.
        ImportError: a search without Optuna.
        KeyboardInterrupt: before anything was tuned.
    """
    target = target_of(config, once=config.alone and config.method not in SEARCHES)
    if config.method in SEARCHES or config.warm_start:
        require_optuna()
    began, seeds, error = time.monotonic(), [], None
    logs = Logs(config, out)
    length = config.length.of(target.make(0))
    try:
        for number in range(config.seeds):
            seed = Seed(History(target.make(number)).start, {})
            for name, outcome in _trainings(target, number, config, length, logs, progress):
                if not seed.outcomes:
                    seeds.append(seed)
                seed.outcomes[name] = outcome
                if outcome.trial.error is not None:
                    raise outcome.trial.error
    except (Exception, KeyboardInterrupt) as raised:
        if not seeds:
            raise
        error = raised
    return Tuned(seeds, time.monotonic() - began, error)


def target_of(config: TaskConfig, *, once: bool = False) -> Target:
    """The task of a command.

    Args:
        once: Whether it is trained but once.

    Raises:
        ValueError: several seeds of a task that has none; several trainings on sources that go on.
    """
    target = load(config.task, config.set)
    if config.seeds > 1 and not target.seeded:
        raise ValueError(
            f"--seeds {config.seeds} needs a task for every seed: make {config.task} a function "
            "that takes seed and draws the weights and the order of the data by it."
        )
    if not (target.made or once):
        check_begins_anew(config.task, target.make(0))
    return target


def _trainings(
    target: Target, seed: int, config: TuneConfig, length: Length, logs: "Logs", progress: Progress
) -> Iterator[tuple[str, Outcome]]:
    """The trainings of one seed by their names, each as soon as it is done.

    The tuned one comes first: what does not fit shows there, and an interrupt costs the others.
    """

    def done(name: str, trial: Trial, found: dict[str, float]) -> tuple[str, Outcome]:
        ended = f", ended {trial.ended}" if trial.ended else ""
        values = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        progress(f"seed {seed}, {name}: {values}  ({trial.seconds:.1f} s{ended})")
        return name, Outcome(trial, found)

    by_method = _searched if config.method in SEARCHES else _tuned
    tuned = by_method(target, seed, config, length, logs)
    yield done(config.method, *tuned)
    if not config.alone:
        as_long = length._replace(episodes=int(tuned.trial.state.episode))
        untouched = target.make(seed)  # made anew: sources begin at their start
        trial = left_alone(untouched, as_long, seed=seed)
        yield done(UNTUNED, trial, judged(trial))
        found = holding(target.make(seed), tuned.trial.hyperparams)
        trial = left_alone(found, as_long, seed=seed)
        yield done(ANEW, trial, judged(trial))


def _tuned(target: Target, seed: int, config: TuneConfig, length: Length, logs: "Logs") -> Outcome:
    """Tuned by hypergradients."""
    named = chosen(config.method)
    method = method_of(named, length.steps)
    outer = OUTER[config.outer](named.outer_rate or config.outer_rate)
    task, state, spent = target.make(seed), None, 0.0
    if n := config.warm_start:
        probes = by_search(target.make, "random", length, n, seed, config.width)
        state, spent = at(task, method, outer, lowest(probes).drawn), probes[-1].spent
    with logs.of(seed, task.stored.natural) as log:
        trial = trained(
            task, method, outer, length, hook=log, patience=config.patience, state=state, seed=seed
        )
    cost = Cost(trial.cost.gradients + spent, trial.cost.products)
    return Outcome(trial._replace(cost=cost), judged(trial))


def _searched(
    target: Target, seed: int, config: TuneConfig, length: Length, logs: "Logs"
) -> Outcome:
    """The best training of a search; after Ctrl-C or an error that of those which are done."""
    done: list[Training] = []
    started, ended, error = time.monotonic(), "", None
    with logs.of(seed, target.make(seed).natural) as log:

        def seen(training: Training) -> None:
            done.append(training)
            log(len(done), replace(training.trial.state, step=len(done), metadata=training.judged))

        trials, width = config.trials, config.width
        try:
            by_search(target.make, config.method, length, trials, seed, width, seen)
        except (Exception, KeyboardInterrupt) as raised:
            if not done:
                raise
            error = raised
            ended = "interrupted" if isinstance(raised, KeyboardInterrupt) else "failed"
    best, cost = lowest(done), Cost(done[-1].spent, 0)
    seconds = time.monotonic() - started
    trial = best.trial._replace(ended=ended, error=error, cost=cost, seconds=seconds)
    return Outcome(trial, best.judged)


class Logs:
    """The logs of a command, new files. What an earlier run has left goes when the first record
    comes: a command that cannot run destroys nothing."""

    def __init__(self, config: TuneConfig, out: Path):
        self.config, self.out, self.begun = config, out, False

    @contextmanager
    def of(self, seed: int, natural: Callable[[Any], Any] | None) -> Iterator[Hook]:
        """A hook that writes every episode of a seed, or every trial of a search."""
        with ExitStack() as stack:
            log: Hook | None = None

            def hook(episode: int, state: BilevelState) -> None:
                nonlocal log
                if log is None:
                    log = log_to(stack.enter_context(self._open(seed)), natural)
                log(episode, state)

            yield hook

    def _open(self, seed: int) -> MultiLogger:
        if self.config.overwrite and not self.begun:
            clear(self.out)
        self.begun = True
        loggers: list[MetricLogger] = [
            CSVLogger(self.out / f"seed{seed}.csv"),
            JSONLinesLogger(self.out / f"seed{seed}.jsonl"),
        ]
        if self.config.tensorboard:
            loggers.append(TensorBoardLogger(events(self.out, seed)))
        return MultiLogger(*loggers)
