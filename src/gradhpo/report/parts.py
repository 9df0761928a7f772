"""The finished parts of a run, kept in its directory until all of it is there.

    found = once("mnist, seed 0, greedy", train, setting, data, types=(Found,))

A study is a loop over parts that do not depend on each other: a method in a setting, on a seed.
Within `keeping`, as in `gradhpo run`, each is written to the directory when it is done, and a later
process that goes on there takes it instead of computing it:

    DIR/run.json                      what is run, see `run_record`
    DIR/unfinished/NAME-DIGEST.json   a part, with the SHA-256 of what it says, until all are there
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from gradhpo.report import run_record
from gradhpo.report.config import Progress, StudyConfig
from gradhpo.report.packing import pack, unpack
from gradhpo.report.provenance import versions
from gradhpo.report.run_directory import held
from gradhpo.report.run_record import Run
from gradhpo.utils._differences import differences
from gradhpo.utils._files import publish, whose

__all__ = ["Parts", "keeping", "once", "unfinished_parts"]

T = TypeVar("T")
Types = tuple[type, ...]

UNFINISHED = "unfinished"
PART = re.compile(r"[A-Za-z0-9._]{0,80}-[0-9a-f]{8}\.json")
WHERE = ("out", "overwrite", "resume")  # settings that no number depends on


def once(name: str, function: Callable[..., T], *arguments: Any, types: Types = ()) -> T:
    """`function(*arguments)`, or what it was when an earlier process of the same run called it.

    Args:
        name: Of the part; no other part of the run has it.
        function: Deterministic; what it returns depends on the settings of the run alone, and not
            on whether other parts have been computed before. Times may differ.
        types: NamedTuples and dataclasses in what it returns, which consists of these, containers,
            numbers, text and arrays. Arrays are NumPy's, whether they were on disk or not.

    >>> import numpy as np
    >>> once("a sum", np.add, np.ones(2), 1)
    array([2., 2.])
    """
    parts = _parts.get()
    if parts is None:
        return unpack(pack(function(*arguments), types), types)
    return parts.once(name, partial(function, *arguments), types)


class Parts:
    """The parts of one run; see `keeping`.

    Attributes:
        out: Absolute.
        begun: Whether this process has computed one.
        seconds: What the parts that were on disk had taken, when they were computed.
    """

    def __init__(self, out: Path, run: Run, tell: Progress, resume: bool) -> None:
        self.out, self.tell, self.seconds = out, tell, 0.0
        self._run, self._resume = run, resume
        self._names: set[str] = set()
        self.begun, self._beginning = False, Lock()

    @property
    def finished(self) -> bool:
        """Whether an earlier process has done all of this run."""
        return self._run.finished

    def once(self, name: str, compute: Callable[[], T], types: Types) -> T:
        """See the function `once`."""
        if name in self._names:
            raise ValueError(f"two parts of this run are {name!r}: is a setting given twice?")
        self._names.add(name)
        readable = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")[:80]
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        path = self.out / UNFINISHED / f"{readable}-{digest}.json"
        if self._resume and path.exists():
            try:
                content = self._read(path, name)
                value = unpack(content["value"], types)
                self.seconds += content["seconds"]
                return value
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.tell(f"{path} is damaged ({error}); this part is computed again")
        began = time.perf_counter()
        value = pack(compute(), types)
        seconds = time.perf_counter() - began
        content = {"name": name, "run": self._run.id, "seconds": seconds, "value": value}
        text = json.dumps({"sha256": _digest(content), "content": content}, indent=1) + "\n"
        self._begin()
        publish(path, lambda path: path.write_text(text, encoding="utf-8", newline=""))
        return unpack(value, types)

    def _begin(self) -> None:
        """The first part is computed: the command can run, and what another run has left goes."""
        with self._beginning:  # parts may be computed side by side
            if self.begun:
                return
            if self._resume:
                run_record.begin(self.out, self._run)
            else:
                run_record.begin(self.out, self._run, partial(_clear, self.out))
            (self.out / UNFINISHED).mkdir(exist_ok=True)
            self.begun = True

    def _read(self, path: Path, name: str) -> dict[str, Any]:
        found = json.loads(path.read_bytes())
        content = found["content"]
        if found["sha256"] != _digest(content):
            raise ValueError("its SHA-256 is another")
        if (content["name"], content["run"]) != (name, self._run.id):
            raise ValueError("it is a part of another run")
        return content

    def finish(self) -> None:
        """The results are written: what was asked for stays, the parts go."""
        run_record.finish(self.out, self._run, ["result.json"])
        _leave(self.out)


@contextmanager
def keeping(study: str, config: StudyConfig, tell: Progress) -> Iterator[Parts]:
    """Within it, `once` keeps the parts of a run, and takes those that are there with `resume`.

    Args:
        study, config: What is run, and where. With `overwrite`, what another run has left goes when
            the first part of this one has been computed.
        tell: Told how much there is already, of damaged parts and of other versions.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, DirectoryBusy, OSError: see `held`.
    """
    out, resume = config.out.absolute(), config.resume
    asked = Run(f"gradhpo run {study}", run_record.settings_of(config, WHERE))
    there = partial(unfinished_parts, out)
    with held(out, asked, UNFINISHED, there, overwrite=config.overwrite, resume=resume) as run:
        parts = Parts(out, run, tell, resume)
        if run.finished:
            yield parts
            return
        if resume:
            _tell_of(out, run, tell)
        token = _parts.set(parts)
        try:
            yield parts
        except BaseException:
            if not there():
                _leave(out)
            elif resume or parts.begun:  # else they are of another run
                tell(f"{len(there())} finished parts are kept in {out}: go on with --resume")
            raise
        finally:
            _parts.reset(token)


def _tell_of(out: Path, run: Run, tell: Progress) -> None:
    if changed := "; ".join(differences(run.versions, versions())):
        tell(f"the finished parts may differ in their last bits from what follows: {changed}")
    tell(f"going on with {len(unfinished_parts(out))} finished parts in {out / UNFINISHED}")


def unfinished_parts(out: Path) -> list[Path]:
    """The files of finished parts in this directory."""
    return sorted(path for path in _own(out) if path.name == whose(path))


def _own(out: Path) -> list[Path]:
    """Of this module, those that were cut off among them."""
    found = (out / UNFINISHED).glob("*.json")
    return [path for path in found if PART.fullmatch(whose(path)) and not path.is_dir()]


def _clear(out: Path) -> None:
    """Remove what another run has left."""
    _leave(out)
    for name in ("result.json", "curves.csv"):
        (out / name).unlink(missing_ok=True)


def _leave(out: Path) -> None:
    """Remove what is ours. Files of others stay, and so does the directory then."""
    for path in _own(out):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        (out / UNFINISHED).rmdir()


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)
