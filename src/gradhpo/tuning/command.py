"""`gradhpo tune`: a task of one's own by a method, beside the same training left alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from tyro.conf import Positional

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.registry import METHODS
from gradhpo.core.source import Pool
from gradhpo.core.task import Task
from gradhpo.driver.hooks import Hook, log_to
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.target import Target, load, setting
from gradhpo.tuning.training import Trial, judge, left_alone, trained, validation
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MetricLogger,
    MultiLogger,
    TensorBoardLogger,
)

__all__ = ["ANEW", "UNTUNED", "Row", "TuneConfig", "Tuned", "tune_target"]

UNTUNED, ANEW = "untuned", "trained anew"


@dataclass(frozen=True)
class TuneConfig:
    """Tune a task of your own and keep what is found.

    Every seed is trained three times on the same batches: with the hyperparameters left where they
    start, tuned while it trains, and anew with what was found. Ctrl-C ends the training after the
    episode and keeps what there is.

    Raises:
        ValueError: a number is out of its range, or there is no such method.
    """

    task: Positional[str]
    """MODULE:NAME, a gradhpo.Task or a function that returns one, in a module of this directory or
    an installed one."""
    out: Path = Path("runs/tune")
    """Directory for the results; created when missing."""
    overwrite: bool = False
    """Replace the files of an earlier run in that directory."""
    method: str = "one_step"
    """The method, by name: see `gradhpo list`."""
    method_set: tuple[str, ...] = ()
    """Settings of the method, NAME=VALUE: gamma=0.9."""
    set: tuple[str, ...] = ()
    """Arguments of the task's function, or where hyperparameters start, NAME=VALUE: lr=3e-3."""
    seeds: int = 1
    """Number of repetitions; the task's function gets `seed`, counted from 0."""
    episodes: int = 50
    """Episodes of each training; every one begins with fresh optimizer slots."""
    steps: int = 20
    """Training steps of an episode; 0 where the task brings the batches of an episode."""
    outer_rate: float = 0.02
    """Step size of Adam on the hyperparameters, as they are stored."""
    patience: int = 0
    """End the tuning after so many episodes without a lower validation loss; 0: never."""
    alone: bool = False
    """Tune only: no training with the hyperparameters left alone, none anew."""
    tensorboard: bool = False
    """Write TensorBoard events as well."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("episodes", 1), ("steps", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not (np.isfinite(self.outer_rate) and self.outer_rate > 0):
            raise ValueError(f"outer_rate must be above 0, not {self.outer_rate}.")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}.")


class Row(NamedTuple):
    """A training of one seed and how it ended, by the whole of the data."""

    trial: Trial
    judged: dict[str, float]  # val_loss, test_loss, and what the loss returns beside


class Tuned(NamedTuple):
    """All trainings of a command."""

    seeds: list[dict[str, Row]]  # by the name of the training; the last ones may miss some
    task: Task  # of the first seed
    seconds: float

    @property
    def complete(self) -> list[dict[str, Row]]:
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


def _interrupted(seed: dict[str, Row]) -> bool:
    return any(row.trial.ended == "interrupted" for row in seed.values())


def tune_target(config: TuneConfig, out: Path, progress: Progress = silent) -> Tuned:
    """Load the task, and train it for every seed.

    Args:
        out: An existing directory, for the logs of every episode.
        progress: Told of every training that is done.

    Raises:
        TypeError, ValueError: the task, the method or a setting is wrong.
        ModuleNotFoundError: there is no such module.
    """
    target = load(config.task, config.set)
    if config.seeds > 1 and not target.seeded:
        raise ValueError(
            f"--seeds {config.seeds} needs a task for every seed: make {config.task} a function "
            "that takes seed and draws the weights and the order of the data by it."
        )
    method, outer = _method(config), optax.adam(config.outer_rate)
    began, first = time.monotonic(), target.make(0)
    if not config.steps and first.train is not None and not isinstance(first.train, Pool):
        raise ValueError(
            "--steps 0 is for tasks whose episodes bring their own batches; this one draws from "
            "sources: say how many steps an episode has."
        )
    seeds: list[dict[str, Row]] = []
    for seed in range(config.seeds):
        seeds.append({})
        for training, row in _rows(target, seed, config, method, outer, out, progress):
            seeds[-1][training] = row
            if row.trial.ended == "interrupted":
                return Tuned(seeds, first, time.monotonic() - began)
    return Tuned(seeds, first, time.monotonic() - began)


def _method(config: TuneConfig) -> EstimatorOptimizer:
    settings, entry = dict(map(setting, config.method_set)), METHODS[config.method]
    known = {field.name for field in fields(entry.optimizer)} - {f.name for f in fields(OF_TASK)}
    known |= {"update_every", "update_last"}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"--method-set {unknown[0]}=...: the method {config.method} has the settings "
            f"{', '.join(sorted(known))}."
        )
    if missing := [name for name in entry.needs if name not in settings]:
        needed = " ".join(f"{name}=..." for name in missing)
        raise ValueError(f"the method {config.method} needs --method-set {needed}")
    settings["inner_optimizer"] = optax.identity()  # a task has its own training step
    return entry.over(config.steps, **settings) if config.steps else entry.make(**settings)


OF_TASK = EstimatorOptimizer  # its settings are those of the task and the run, but two


def _rows(
    target: Target,
    seed: int,
    config: TuneConfig,
    method: EstimatorOptimizer,
    outer: optax.GradientTransformation,
    out: Path,
    progress: Progress,
) -> Iterator[tuple[str, Row]]:
    """The trainings of one seed, each as soon as it is done: `(name, row)`.

    The tuned one comes first: what does not fit shows there, and an interrupt costs the others.
    """
    length: dict[str, Any] = {"episodes": config.episodes, "steps": config.steps or None}

    def done(name: str, task: Task, trial: Trial) -> tuple[str, Row]:
        row = Row(trial, _judged(task, trial))
        ended = f", ended {trial.ended}" if trial.ended else ""
        values = "  ".join(f"{key} {value:.4g}" for key, value in row.judged.items())
        progress(f"seed {seed}, {name}: {values}  ({trial.seconds:.1f} s{ended})")
        return name, row

    task = target.make(seed)
    with _logging(config, out, seed, task) as log:
        trial = trained(task, method.method, outer, hook=log, patience=config.patience, **length)
    yield done(config.method, task, trial)
    if not config.alone:
        found = trial.hyperparams
        task = target.make(seed)  # anew: sources that are functions begin at their first batch
        yield done(UNTUNED, task, left_alone(task, **length))
        task = target.make(seed).replace(hyperparams=found)
        yield done(ANEW, task, left_alone(task, **length))


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


def _judged(task: Task, trial: Trial) -> dict[str, float]:
    found = {f"val_{name}": x for name, x in validation(task, trial).items()}
    if task.test is not None:
        examples = getattr(task.val, "batch_size", 256)
        on_test = judge(task, trial.state, task.test, examples)
        found |= {f"test_{name}": x for name, x in on_test.items()}
    return found
