"""The options of `gradhpo tune` and `gradhpo compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from gradhpo.driver.failure import OnFailure
from gradhpo.tuning.methods import chosen
from gradhpo.tuning.training import Length

__all__ = ["CompareConfig", "TaskConfig", "TuneConfig", "check_number_of"]


MOST = np.iinfo(np.int32).max


def check_number_of(name: str, value: int) -> None:
    """A number of things that are counted in 32 bits.

    Raises:
        ValueError: it is below 1 or too large.
    """
    if not 1 <= value <= MOST:
        raise ValueError(f"{name} must be from 1 to {MOST}, not {value}.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is trained, and for how long.

    Raises:
        ValueError: a number is out of its range.
    """

    task: Positional[str]
    """MODULE:NAME, a gradhpo.Task or a function that returns one, in a module of this directory or
    an installed one."""
    out: Path = Path("runs/tune")
    """Directory for the results; created when missing."""
    overwrite: bool = False
    """Replace the files of an earlier run in that directory."""
    resume: bool = False
    """Go on with the run in that directory, which was cut off: the same command, or more seeds."""
    set: tuple[str, ...] = ()
    """Arguments of the task's function, or where hyperparameters start, NAME=VALUE: lr=3e-3."""
    seeds: int = 1
    """Number of repetitions; the task's function gets `seed`, counted from 0."""
    episodes: int = 50
    """Episodes of a training; every one begins with fresh optimizer slots."""
    steps: int = 20
    """Training steps of an episode."""
    outer_rate: float = 0.02
    """Step size on the hyperparameters, as they are stored."""
    outer: Literal["adam", "sgd"] = "adam"
    """The optimizer of the hyperparameters; a simplex that is kept by projection needs sgd."""
    on_failure: OnFailure = "skip"
    """After an update that is rejected because something is not finite: skip it, stop the training
    after its episode, or raise: end the command with exit status 1. For trainings by hypergradients
    alone; the others have no updates."""
    width: float = 3.0
    """Searches draw from this far to both sides of the start, in what is stored: 3 is a factor of
    20 for `spaces.log()`."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run, overwrite begins anew: give one of them.")
        for name in ("seeds", "episodes", "steps"):
            check_number_of(name, getattr(self, name))
        for name in ("outer_rate", "width"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, not {value}.")

    def _at_least(self, name: str, least: float) -> None:
        if not getattr(self, name) >= least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")

    @property
    def length(self) -> Length:
        """Of one training."""
        return Length(self.episodes, self.steps)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TaskConfig):
    """Tune a task of your own and keep what is found.

    Every seed is trained three times on the same batches: tuned while it trains, with the
    hyperparameters left where they start, and anew with what was found. Ctrl-C ends the training
    after its episode, or a search after its last whole training, and keeps what there is.

    Raises:
        ValueError: a number is out of its range, or there is no such method.
    """

    method: str = "one_step"
    """The method, by name: see `gradhpo list`; with settings, hyperdistill:gamma=0.9; or a search,
    random, tpe or cmaes, which trains again and again."""
    trials: int = 10
    """Trainings of a search."""
    warm_start: int = 0
    """Begin where the best of so many trainings with random hyperparameters ends lowest."""
    patience: int = 0
    """End the tuning after so many episodes without a lower validation loss, and the other two
    trainings after as many episodes; 0: never."""
    alone: bool = False
    """Tune only: no training with the hyperparameters left alone, none anew."""
    tensorboard: bool = False
    """Write TensorBoard events as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("trials", 1)
        self._at_least("warm_start", 0)
        self._at_least("patience", 0)
        chosen(self.method)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TaskConfig):
    """Compare methods on a task of your own, each for the same number of gradients.

    Methods that follow hypergradients train again and again, their hyperparameters going on from
    training to training; searches draw them anew. What counts is the model with the lowest
    validation loss so far.

    Raises:
        ValueError: a number is out of its range, or there is no such method.
    """

    out: Path = Path("runs/compare")
    """Directory for the results; created when missing."""
    method: tuple[str, ...] = ("one_step", "random")
    """Methods, searches (random, tpe, cmaes) among them, with settings where there are any:
    reverse:outer_rate=0.2. Differences are to the first."""
    budget: float = 0.0
    """Gradients that each may take in a seed; 0: those of twenty plain trainings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("budget", 0)
        if len({chosen(word).word for word in self.method}) < max(1, len(self.method)):
            raise ValueError(f"name each method once, not {' '.join(self.method) or 'none'}.")
