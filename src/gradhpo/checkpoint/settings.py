"""Where a run keeps its states, and how often."""

import dataclasses
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

from gradhpo.utils.settings import check_choice, check_count

__all__ = ["CheckpointArgument", "Checkpoints", "as_settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """For `run(checkpoint=...)` and `gradhpo.tune`, where a path alone is not enough.

    Args:
        directory: Of one run. A run that finds checkpoints of itself there goes on from the newest.
        seconds: The least time between two checkpoints; they are taken at the ends of episodes, in
            the background. 0: after every episode (or call of several). The last state of a run,
            and that of one that is interrupted or fails, is saved in any case.
        keep: How many stay after each save.
        on_error: "warn": a checkpoint that cannot be written (disk full) is told of, and the run
            goes on; "raise": it ends the run. At the end of a run it is always an error.
        about: Facts that belong to the run, such as settings of a script: a run that goes on must
            have the same. JSON.
        accept_changes: Go on also where settings, programs or data are others than those the
            checkpoint is of; they are told of.
        takeover: The holder of the directory, on another machine, is known to have ended.
    """

    directory: str | os.PathLike
    seconds: float = 30.0
    keep: int = 2
    on_error: str = "warn"
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accept_changes: bool = False
    takeover: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"directory must be a path, got {type(self.directory).__name__}.")
        if not (isinstance(self.seconds, Real) and self.seconds >= 0):
            raise ValueError(f"seconds must be a number of at least 0, got {self.seconds!r}.")
        check_count("keep", self.keep)
        check_choice("on_error", self.on_error, ("warn", "raise"))
        for name in ("accept_changes", "takeover"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}.")


CheckpointArgument = str | os.PathLike | Checkpoints | None


def as_settings(checkpoint: CheckpointArgument) -> Checkpoints | None:
    """What a user has given as `checkpoint=`.

    Raises:
        TypeError: neither a path nor settings.
    """
    if checkpoint is None or isinstance(checkpoint, Checkpoints):
        return checkpoint
    if isinstance(checkpoint, str | os.PathLike):
        return Checkpoints(directory=checkpoint)
    raise TypeError(
        "checkpoint must be the path of a directory or a gradhpo.checkpoint.Checkpoints, got "
        f"{type(checkpoint).__name__}."
    )
