"""The directory of `gradhpo tune` and `gradhpo compare`: what in it is ours, and what run it holds.

`run.json` says what was asked for, and whether it has been done to the end; `checkpoints/` has the
trainings, see `places`, and the lock that one command at a time holds. Links are never followed.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradhpo.checkpoint.lock import only_writer
from gradhpo.report import output_directory
from gradhpo.report.config import Progress
from gradhpo.tuning.config import TaskConfig
from gradhpo.tuning.places import Place
from gradhpo.utils._differences import differences
from gradhpo.utils._files import publish

__all__ = ["OURS", "RunDirectory", "clear", "events", "opened"]

OURS = (
    *("result.json", "curves.csv", "hyperparams.json", "optimizer.py", "report.html"),
    *("losses.png", "hyperparams.png", "hypergradient.png", "compare.png"),
)
RUN, KEPT = "run.json", "checkpoints"
LOG = re.compile(r"seed\d+\.(csv|jsonl)")
TRAINING = re.compile(r"seed\d+-\w+(-\w+)?")
FREE = ("out", "overwrite", "resume", "tensorboard", "seeds")  # may differ in a run that goes on


def clear(out: Path) -> None:
    """Remove what an earlier run of `tune` or `compare` has left, and nothing else: not what is
    kept of its trainings."""
    logs = [path for path in out.glob("seed*") if LOG.fullmatch(path.name)]
    written = [
        path
        for path in out.glob("tensorboard/seed*/events.*")
        if path.parent.name[4:].isdecimal()
        and not (path.parent.is_symlink() or path.parent.parent.is_symlink())
    ]
    for path in [*logs, *written, *(out / name for name in (*OURS, RUN))]:
        path.unlink(missing_ok=True)


def events(out: Path, seed: int) -> Path:
    """Where TensorBoard's events of a seed go.

    Raises:
        NotADirectoryError: that leads out of the directory of the run.
    """
    return _own(out / "tensorboard" / f"seed{seed}", out / "tensorboard")


def _own(place: Path, *above: Path) -> Path:
    if any(path.is_symlink() for path in (place, *above)):
        raise NotADirectoryError(
            f"{place} is a link, or lies below one, and would lead elsewhere: remove it."
        )
    return place


class RunDirectory:
    """A command at work in its directory.

    Attributes:
        out: Absolute.
        keeps: Whether trainings are kept: with the extra `checkpoint`.
        begun: Whether there is something to go on with.
        finished: Whether an earlier process has done all of this run.
    """

    def __init__(
        self, out: Path, config: TaskConfig, about: dict[str, Any], keeps: bool, tell: Progress
    ):
        self.out, self.keeps, self.finished = out, keeps, False
        self._config, self._about, self._tell = config, about, tell
        self.begun = self._cleared = False

    def place(self, name: str) -> Place:
        """For a training, or several in a row, of this name."""
        if not self.keeps:
            return Place(None, self.begin)
        if self._config.overwrite and not self._cleared:
            for path in (self.out / KEPT).iterdir():
                if TRAINING.fullmatch(path.name):
                    Place(path).remove()
        self._cleared = True
        return Place(self.out / KEPT / name, self.begin)

    def begin(self) -> None:
        """The first episode is done. What an earlier run has left goes now and not before: a
        command that cannot run destroys no results."""
        if self.begun:
            return
        self.begun = True
        if self._config.overwrite:
            clear(self.out)
        self._write(finished=False)
        if not self.keeps:
            self._tell('cannot go on if it is cut off: pip install ".[checkpoint]"')

    def end(self) -> None:
        """All is done, and the results are written."""
        self._write(finished=True)

    def _write(self, finished: bool) -> None:
        if self.keeps:
            content = self._about | {"seeds": self._config.seeds, "finished": finished}
            text = json.dumps(content, indent=1) + "\n"
            publish(self.out / RUN, lambda path: path.write_text(text, encoding="utf-8"))


@contextmanager
def opened(command: str, config: TaskConfig, tell: Progress) -> Iterator[RunDirectory]:
    """The directory of a command, which no other command writes to meanwhile.

    Args:
        command: "tune" or "compare".
        tell: Told that a run goes on, or that it could not.

    Raises:
        FileExistsError: it holds results, or a run that was cut off, and nothing is said of them.
        FileNotFoundError: `--resume`, and there is no run to go on with.
        ValueError: `--resume`, and the run there is another one; names what differs.
        DirectoryBusy: another process is at work there.
        ImportError: `--resume` without the extra `checkpoint`.
        OSError: the directory cannot be written to, or `checkpoints` in it is a link.
    """
    keeps = all(map(find_spec, ("filelock", "orbax")))
    if config.resume and not keeps:
        raise ImportError('--resume needs more packages: pip install ".[checkpoint]"')
    again = config.overwrite or config.resume or (keeps and (config.out / KEPT).is_dir())
    out = output_directory(config.out, again, OURS)
    about = {"command": command, "settings": _settings(config)}
    run = RunDirectory(out, config, about, keeps, tell)
    with ExitStack() as stack:
        if keeps:
            kept = _own(out / KEPT)
            kept.mkdir(exist_ok=True)
            stack.enter_context(only_writer(kept))
            found = _read(out / RUN)
            if config.resume:
                _check_same(out, found, about, config)
                run.finished = _is_finished(out, found, config)
                if not run.finished:
                    tell(f"going on with the run in {out}")
            elif found and not found.get("finished", True) and not config.overwrite:
                raise FileExistsError(
                    f"{out} holds a run that was cut off. Go on by --resume, choose another "
                    "directory with --out, or begin anew with --overwrite."
                )
            elif not config.overwrite:
                output_directory(out, False, OURS)
        try:
            yield run
        except BaseException:
            if run.begun and keeps:
                tell(f"what is done is kept in {out}: go on with --resume")
            raise


def _settings(config: TaskConfig) -> dict[str, Any]:
    found = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    return json.loads(json.dumps(found))


def _read(path: Path) -> dict[str, Any] | None:
    """What `run.json` says; None: there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _check_same(
    out: Path, found: dict[str, Any] | None, about: dict[str, Any], config: TaskConfig
) -> None:
    if found is None:
        raise FileNotFoundError(f"{out} holds no run to go on with; without --resume one is begun.")
    before, settings, seeds = (found.get(key) for key in ("command", "settings", "seeds"))
    if not (isinstance(settings, dict) and isinstance(seeds, int)):
        raise ValueError(
            f"{out / RUN} is damaged, or none of gradhpo {about['command']}: begin anew with "
            "--overwrite, or in another directory."
        )
    if before != about["command"]:
        raise ValueError(f"{out} holds a run of gradhpo {before}, not of {about['command']}.")
    defaults = _settings(type(config)(task=config.task))  # of options that it did not have then
    changed = differences(_options(defaults | settings), _options(about["settings"]))
    if config.seeds < seeds:
        changed.append(f"--seeds: {seeds} -> {config.seeds}")
    if changed:
        raise ValueError(
            f"the run in {out} is another one: {'; '.join(changed)}. Give what it was begun with, "
            "or begin this one in another directory with --out."
        )


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """By the words of the command line."""
    return {
        name if name == "task" else f"--{name.replace('_', '-')}": value
        for name, value in settings.items()
    }


def _is_finished(out: Path, found: dict[str, Any] | None, config: TaskConfig) -> bool:
    assert found is not None
    done = found.get("finished") is True and found["seeds"] == config.seeds
    return done and (out / "result.json").is_file()
