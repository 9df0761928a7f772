"""`gradhpo tune`: a task of one's own by a method, beside the same training left alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import optax

from gradhpo.core.estimator import Cost
from gradhpo.core.task import Task
from gradhpo.driver.hooks import Hook, log_to
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.comparing import by_search, lowest
from gradhpo.tuning.config import TaskConfig, TuneConfig
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.searches import SEARCHES, require_optuna
from gradhpo.tuning.target import Target, load
from gradhpo.tuning.training import History, Trial, judged, left_alone, trained
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MetricLogger,
    MultiLogger,
    TensorBoardLogger,
)

__all__ = ["ANEW", "UNTUNED", "Outcome", "Tuned", "seeded", "tune_target"]

UNTUNED, ANEW = "untuned", "trained anew"


class Outcome(NamedTuple):
    """A training of one seed and how it ended, by the whole of the data."""

    trial: Trial
    judged: dict[str, float]  # val_loss, test_loss, and what the loss returns beside


class Tuned(NamedTuple):
    """All trainings of a command."""

    seeds: list[dict[str, Outcome]]  # by the name of the training; the last ones may miss some
    task: Task  # of the first seed
    seconds: float

    @property
    def complete(self) -> list[dict[str, Outcome]]:
        """Seeds with all of their trainings, none of them interrupted."""
        return [
            seed
            for seed in self.seeds
            if len(seed) == len(self.seeds[0]) and not _interrupted(seed)
        ]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has ended it."""
        return _interrupted(self.seeds[-1])


def _interrupted(seed: dict[str, Outcome]) -> bool:
    return any(row.trial.ended == "interrupted" for row in seed.values())


def tune_target(config: TuneConfig, out: Path, progress: Progress = silent) -> Tuned:
    """Load the task, and train it for every seed.

    Args:
        out: An existing directory, for the logs of every episode.
        progress: Told of every training that is done.

    Raises:
        TypeError, ValueError: the task, the method or a setting is wrong.
        ModuleNotFoundError: there is no such module.
        ImportError: a search without Optuna.
    """
    target = seeded(config)
    if config.method in SEARCHES or config.warm_start:
        require_optuna()
    began, first = time.monotonic(), target.make(0)
    seeds: list[dict[str, Outcome]] = []
    for seed in range(config.seeds):
        seeds.append({})
        for training, row in _rows(target, seed, config, out, progress):
            seeds[-1][training] = row
            if row.trial.ended == "interrupted":
                return Tuned(seeds, first, time.monotonic() - began)
    return Tuned(seeds, first, time.monotonic() - began)


def seeded(config: TaskConfig) -> Target:
    """The task of a command.

    Raises:
        ValueError: several seeds of a task that has none.
    """
    target = load(config.task, config.set)
    if config.seeds > 1 and not target.seeded:
        raise ValueError(
            f"--seeds {config.seeds} needs a task for every seed: make {config.task} a function "
            "that takes seed and draws the weights and the order of the data by it."
        )
    return target


def _rows(
    target: Target, seed: int, config: TuneConfig, out: Path, progress: Progress
) -> Iterator[tuple[str, Outcome]]:
    """The trainings of one seed, each as soon as it is done: `(name, row)`.

    The tuned one comes first: what does not fit shows there, and an interrupt costs the others.
    """

    def done(name: str, trial: Trial, found: dict[str, float]) -> tuple[str, Outcome]:
        ended = f", ended {trial.ended}" if trial.ended else ""
        values = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        progress(f"seed {seed}, {name}: {values}  ({trial.seconds:.1f} s{ended})")
        return name, Outcome(trial, found)

    by_method = _searched if config.method in SEARCHES else _tuned
    tuned = by_method(target, seed, config, out)
    yield done(config.method, *tuned)
    if not config.alone:
        task = target.make(seed)  # anew: sources that are functions begin at their first batch
        trial = left_alone(task, config.length)
        yield done(UNTUNED, trial, judged(task, trial))
        task = target.make(seed).replace(hyperparams=tuned.trial.hyperparams)
        trial = left_alone(task, config.length)
        yield done(ANEW, trial, judged(task, trial))


def _tuned(target: Target, seed: int, config: TuneConfig, out: Path) -> Outcome:
    """Tuned by hypergradients."""
    method = chosen(config.method)
    task, spent = target.make(seed), 0.0
    if config.warm_start:
        length, width = config.length, config.width
        probes = by_search(target.make, "random", length, config.warm_start, seed, width)
        task = target.make(seed).replace(hyperparams=lowest(probes).trial.hyperparams)
        spent = probes[-1].spent
    with _logging(config, out, seed, task) as log:
        trial = trained(
            task,
            method_of(method, config.steps),
            optax.adam(method.outer_rate or config.outer_rate),
            config.length,
            hook=log,
            patience=config.patience,
        )
    cost = Cost(trial.cost.gradients + spent, trial.cost.products)
    return Outcome(trial._replace(cost=cost), judged(task, trial))


def _searched(target: Target, seed: int, config: TuneConfig, out: Path) -> Outcome:
    """The best of the trials of a search; its history is that of the trials."""
    task = target.make(seed)
    done = by_search(target.make, config.method, config.length, config.trials, seed, config.width)
    best, history = lowest(done), History(task)
    with _logging(config, out, seed, task) as log:
        for number, each in enumerate(done, start=1):
            history.add(each.judged, each.trial.state.hyperparams)
            log(number, replace(each.trial.state, step=number, metadata=each.judged))
    cost, seconds = Cost(done[-1].spent, 0), sum(each.trial.seconds for each in done)
    return Outcome(best.trial._replace(history=history, cost=cost, seconds=seconds), best.judged)


@contextmanager
def _logging(config: TuneConfig, out: Path, seed: int, task: Task) -> Iterator[Hook]:
    """A hook that writes every episode of a seed to new files."""
    files = [out / f"seed{seed}.csv", out / f"seed{seed}.jsonl"]
    for path in files:
        path.unlink(missing_ok=True)  # loggers append
    loggers: list[MetricLogger] = [CSVLogger(files[0]), JSONLinesLogger(files[1])]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(out / "tensorboard" / f"seed{seed}"))
    with MultiLogger(*loggers) as logger:
        yield log_to(logger, task.stored.natural)
