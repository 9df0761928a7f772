"""The directory of `gradhpo tune` and `gradhpo compare`: what in it is ours, and what run it holds.

`run.json` says what was asked for, and whether it has been done to the end; `checkpoints/` has the
trainings, see `places`. Links are never followed.

A command that overwrites an earlier run finds its trainings out of the way, in
`checkpoints/.earlier-ID`: they go when `run.json` says that the new run has begun, and go back if
it never does.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from gradhpo.checkpoint.lock import only_writer
from gradhpo.report import run_record
from gradhpo.report.config import Progress
from gradhpo.report.run_directory import held
from gradhpo.report.run_record import Run, settings_of
from gradhpo.tuning.config import TaskConfig
from gradhpo.tuning.places import Place
from gradhpo.utils._files import not_a_link

__all__ = ["OURS", "RunDirectory", "clear", "events", "opened"]

OURS = (
    *("result.json", "curves.csv", "hyperparams.json", "optimizer.py", "report.html"),
    *("losses.png", "hyperparams.png", "hypergradient.png", "compare.png"),
)
KEPT, EARLIER = "checkpoints", ".earlier-"
ASIDE = re.compile(rf"{re.escape(EARLIER)}([0-9a-f]{{16}}|unknown)")
LOG = re.compile(r"seed\d+\.(csv|jsonl)")
TRAINING = re.compile(r"seed\d+-\w+(-\w+)?")
FREE = ("out", "overwrite", "resume", "tensorboard", "seeds")  # may differ in a run that goes on


def clear(out: Path) -> None:
    """Remove what an earlier run of `tune` or `compare` has left, and nothing else: not what is
    kept of its trainings."""
    written = [
        path
        for path in out.glob("tensorboard/seed*/events.*")
        if path.parent.name[4:].isdecimal()
        and not (path.parent.is_symlink() or path.parent.parent.is_symlink())
    ]
    for path in [*_results(out), *written]:
        path.unlink(missing_ok=True)


def _results(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name in OURS or LOG.fullmatch(path.name)]


def events(out: Path, seed: int) -> Path:
    """Where TensorBoard's events of a seed go.

    Raises:
        NotADirectoryError: that leads out of the directory of the run.
    """
    return not_a_link(not_a_link(out / "tensorboard") / f"seed{seed}")


class RunDirectory:
    """A command at work in its directory.

    Attributes:
        out: Absolute.
        keeps: Whether trainings are kept: with the extra `checkpoint`.
        begun: Whether there is something to go on with.
        finished: Whether an earlier process has done all of this run.
    """

    def __init__(self, out: Path, run: Run, config: TaskConfig, keeps: bool, tell: Progress):
        self.out, self.keeps, self.finished = out, keeps, run.finished
        self._run, self._overwrite, self._tell = run, config.overwrite, tell
        self.begun = False

    def place(self, name: str) -> Place:
        """For a training, or several in a row, of this name."""
        path = not_a_link(self.out / KEPT / name) if self.keeps else None
        return Place(path, self.begin, self._run.id)

    def begin(self) -> None:
        """The first episode is done. What an earlier run has left goes now and not before: a
        command that cannot run destroys no results."""
        if self.begun:
            return
        old = partial(clear, self.out) if self._overwrite else lambda: None
        if self.keeps:
            run_record.begin(self.out, self._run, old)
            _settle(self.out)
        else:
            old()
            (self.out / run_record.RUN).unlink(missing_ok=True)
            self._tell('cannot go on if it is cut off: pip install ".[checkpoint]"')
        self.begun = True

    def end(self) -> None:
        """All is done, and the results are written."""
        if self.keeps:
            run_record.finish(self.out, self._run, (path.name for path in _results(self.out)))


@contextmanager
def opened(command: str, config: TaskConfig, tell: Progress) -> Iterator[RunDirectory]:
    """The directory of a command, which no other command writes to meanwhile.

    Args:
        command: "tune" or "compare".
        tell: Told that a run goes on, or that it could not.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, DirectoryBusy, OSError: see `held`.
        ImportError: `--resume` without the extra `checkpoint`.
    """
    out, overwrite, resume = config.out.absolute(), config.overwrite, config.resume
    asked = Run(f"gradhpo {command}", settings_of(config, FREE), config.seeds)
    keeps = _installed("orbax.checkpoint")
    if resume and not keeps:
        raise ImportError('--resume needs more packages: pip install ".[checkpoint]"')
    if resume and _set_aside(out):  # by a command that was killed before it began
        with only_writer(out):
            _settle(out)
    with held(
        out,
        asked,
        KEPT,
        lambda: any(Place(path).used for path in _trainings(out / KEPT)),
        overwrite=overwrite,
        resume=resume,
        names=OURS,
        defaults=settings_of(type(config)(task=config.task), FREE),
    ) as run:
        directory = RunDirectory(out, run, config, keeps, tell)
        if run.finished or not keeps:
            yield directory
            return
        _settle(out)
        if resume:
            tell(f"going on with the run in {out}")
        else:
            _make_room(out)
        try:
            yield directory
        except BaseException:
            if directory.begun:
                tell(f"what is done is kept in {out}: go on with --resume")
            else:
                _settle(out)
            raise


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # what it is a part of is missing
        return False


def _make_room(out: Path) -> None:
    """No training goes on from one of an earlier run: those are set aside, and removed when this
    one has begun."""
    for path in _trainings(out / KEPT):
        Place(path).move(out / KEPT / _aside(out) / path.name)


def _settle(out: Path) -> None:
    """Trainings that were set aside go back where they were, if the directory still holds their
    run; else another one has begun, and they go."""
    for aside in _set_aside(out):
        for path in _trainings(aside):
            if aside.name == _aside(out):
                Place(path).move(out / KEPT / path.name)
            else:
                Place(path).remove()
        with suppress(OSError):  # something of others is in there
            aside.rmdir()


def _set_aside(out: Path) -> list[Path]:
    kept = out / KEPT
    found = () if kept.is_symlink() else kept.glob(f"{EARLIER}*")
    return [path for path in found if ASIDE.fullmatch(path.name) and not path.is_symlink()]


def _aside(out: Path) -> str:
    with suppress(ValueError):  # damaged
        if run := run_record.read(out):
            return f"{EARLIER}{run.id}"
    return f"{EARLIER}unknown"


def _trainings(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if TRAINING.fullmatch(path.name))
    return [path for path in found if not path.is_symlink()]
