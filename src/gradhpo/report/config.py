"""The settings that every study has, and how it tells of its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

__all__ = ["DataStudyConfig", "Progress", "StudyConfig", "silent"]

Progress = Callable[[str], None]
"""Told one line of text whenever a part of a study is done; must not raise."""


def silent(line: str) -> None:
    """The `Progress` that says nothing: the default of every `run(config, progress=silent)`.

    >>> silent("one_step: 5 seeds done")
    """
    del line


@dataclass(frozen=True)
class StudyConfig:
    """Settings that every study has; a study's `Config` adds its own and may change defaults.

    Each field becomes a command-line option, with the text below it as its help.

    Raises:
        ValueError: `seeds` is below 1, or `method` names something the study does not know.

    >>> StudyConfig(seeds=3).seeds
    3
    """

    baselines: ClassVar[tuple[str, ...]] = ()  # names a study adds to the registered methods

    out: Path = Path("results")
    """Directory for the results; created when missing."""
    overwrite: bool = False
    """Replace the files of an earlier run in that directory."""
    resume: bool = False
    """Go on with the run of these settings that was cut off in that directory."""
    seeds: int = 5
    """Number of repetitions with different seeds."""
    fast: bool = False
    """A short run that shows the shape of the result, not its final numbers."""
    method: tuple[str, ...] = ()
    """Methods to compare, by name (see `gradhpo list`); none means the study's own choice."""

    def __post_init__(self) -> None:
        self._at_least(seeds=1)
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run, overwrite begins anew: give one of them.")
        if not self.method:
            return  # keeps a plain `--help` free of the methods' imports
        known = self.known_methods()
        unknown = [name for name in self.method if name not in known]
        if unknown:
            raise ValueError(
                f"unknown method {', '.join(map(repr, unknown))}; known: {', '.join(known)}."
            )
        if len(set(self.method)) < len(self.method):
            raise ValueError(f"a method is named twice: {', '.join(self.method)}.")

    def _at_least(self, **least: int) -> None:
        """Refuse settings below the least that they may be; for `__post_init__`."""
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, not {getattr(self, name)}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        """Names accepted in `method`: the study's baselines, then the registered methods.

        A study that can run only some of the registered methods overrides this.
        """
        from gradhpo.algorithms.registry import METHODS

        return (*cls.baselines, *METHODS)


@dataclass(frozen=True)
class DataStudyConfig(StudyConfig):
    """`StudyConfig` of a study on a data set; the study gives `dataset` its default.

    >>> DataStudyConfig(dataset="digits").data_dir is None
    True
    """

    dataset: str = "mnist"
    """Name of the data set."""
    data_dir: Path | None = None
    """Directory that holds the data files; by default the cache, filled by a download."""
