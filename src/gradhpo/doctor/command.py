"""The options of `gradhpo doctor`."""

from dataclasses import dataclass

from tyro.conf import Positional

from gradhpo.doctor.examine import METHODS, Diagnosis, doctor
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.config import check_number_of
from gradhpo.tuning.methods import chosen
from gradhpo.tuning.searches import SEARCHES
from gradhpo.tuning.target import load

__all__ = ["DoctorConfig", "examine"]


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look for faults of a task of your own, and measure methods on it.

    Raises:
        ValueError: a number is out of its range, or there is no such method.
    """

    task: Positional[str]
    """MODULE:NAME, a gradhpo.Task or a function that returns one, in a module of this directory or
    an installed one."""
    set: tuple[str, ...] = ()
    """Arguments of the task's function, or where hyperparameters start, NAME=VALUE: lr=3e-3."""
    steps: int = 20
    """Training steps of an episode; the exact hypergradient goes through all of them."""
    episodes: int = 50
    """Episodes of the run that is meant, for the advice on the outer rate."""
    method: tuple[str, ...] = METHODS
    """Methods to measure, by name: see `gradhpo list`."""
    limit: float = 120.0
    """Seconds after which nothing is begun that can be left out."""

    def __post_init__(self) -> None:
        for name in ("steps", "episodes"):
            check_number_of(name, getattr(self, name))
        if not self.limit >= 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}.")
        for word in self.method:
            if chosen(word).name in SEARCHES or ":" in word:
                raise ValueError(f"doctor measures methods by their names alone, not {word}.")


def examine(config: DoctorConfig, progress: Progress = silent) -> Diagnosis:
    """The diagnosis of the task that the command names; see `gradhpo.doctor.doctor`."""
    target = load(config.task, config.set)
    progress(f"{config.task}: nothing is begun after {config.limit:.0f} s, most of it compilation")
    return doctor(
        lambda: target.make(0),
        config.steps,
        episodes=config.episodes,
        methods=config.method,
        limit=config.limit,
        progress=progress,
    )
