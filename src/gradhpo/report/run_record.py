"""`run.json`: which run a directory holds, so that no other is taken for it or mixed with it.

All commands that go on by `--resume` write it when there is something to go on from, and once more
when their results are there. What they keep on the way bears the name of the run, and is read by no
other.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from gradhpo.report.provenance import versions
from gradhpo.report.results import plain
from gradhpo.utils._differences import differences
from gradhpo.utils._files import publish

__all__ = ["RUN", "Run", "begin", "finish", "read", "resumed", "settings_of"]

RUN, FORMAT = "run.json", 1


@dataclasses.dataclass(frozen=True)
class Run:
    """What a command was asked for, and how far it is."""

    command: str  # "gradhpo tune"
    settings: dict[str, Any]  # what the numbers depend on, as JSON has it
    seeds: int | None = None  # where it may go on with more; else they are among the settings
    finished: bool = False
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    versions: dict[str, Any] = dataclasses.field(default_factory=versions)  # that it began with
    files: list[str] = dataclasses.field(default_factory=list)  # its results, when finished


def settings_of(config: Any, free: Collection[str]) -> dict[str, Any]:
    """The settings of a dataclass as JSON has them, but for those that no number depends on."""
    return {name: value for name, value in plain(config).items() if name not in free}


def begin(out: Path, run: Run, clear: Callable[[], object] = lambda: None) -> None:
    """From now on the directory holds this run, and another one no more.

    Args:
        clear: Removes what another one has left; called when it is sure that this can be written.
    """
    _write(out, dataclasses.replace(run, finished=False), clear)


def finish(out: Path, run: Run, files: Iterable[str]) -> None:
    """All is done, and the results are written, to these files."""
    _write(out, dataclasses.replace(run, finished=True, files=sorted(files)))


def _write(out: Path, run: Run, clear: Callable[[], object] = lambda: None) -> None:
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(run)}, indent=1) + "\n"

    def make(path: Path) -> None:
        path.write_text(text, encoding="utf-8", newline="")
        clear()

    publish(out / RUN, make)


def read(out: Path) -> Run | None:
    """The run that a directory holds; None: there is none.

    Raises:
        ValueError: `run.json` is damaged, or of another format.
    """
    try:
        found = json.loads((out / RUN).read_bytes())
        if found.pop("format") == FORMAT:
            run = Run(**found)
            kinds = (str, dict, int | None, bool, str, dict, list)
            if all(map(isinstance, dataclasses.astuple(run), kinds)):
                return run
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise ValueError(
        f"{out / RUN} is damaged, or of another release: what is there cannot go on. Begin anew "
        "with --overwrite, or in another directory with --out."
    )


def resumed(out: Path, run: Run, defaults: Mapping[str, Any] | None = None) -> Run:
    """The run in a directory, if it is the one that is asked for.

    Args:
        defaults: Values of settings, for those that an earlier release did not have.

    Returns:
        Unfinished, where more seeds are asked for or its results have been removed.

    Raises:
        FileNotFoundError: there is none to go on with.
        ValueError: it is another one; names what differs, old -> new.
    """
    found = read(out)
    if found is None:
        raise FileNotFoundError(f"{out} holds no run to go on with; without --resume one is begun.")
    if found.command != run.command:
        raise ValueError(f"{out} holds a run of {found.command}, not of {run.command}.")
    before = {**(defaults or {}), **found.settings}
    changed = differences(_options(before), _options(run.settings))
    if found.seeds is not None and run.seeds is not None and run.seeds < found.seeds:
        changed.append(f"--seeds: {found.seeds} -> {run.seeds}")
    if changed:
        raise ValueError(
            f"the run in {out} is another one, and runs do not mix: {'; '.join(changed)}. Give "
            "what it was begun with, or begin this one in another directory with --out."
        )
    there = all((out / name).is_file() for name in found.files)
    whole = found.finished and found.seeds == run.seeds and there
    return dataclasses.replace(run, id=found.id, versions=found.versions, finished=whole)


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """By the words of the command line, where a task alone stands without its name."""
    return {
        name if name == "task" else f"--{name.replace('_', '-')}": value
        for name, value in settings.items()
    }
