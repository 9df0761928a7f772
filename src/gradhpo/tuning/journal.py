"""What a command remembers of episodes and trainings, a line for each."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from gradhpo.core.estimator import Cost
from gradhpo.utils._files import name_aside, not_a_link, publish
from gradhpo.utils.validation import complain

__all__ = ["Done", "Journal", "LogRow"]


FORMAT = 1  # of a file; a row may get more fields that have a default


class LogRow(NamedTuple):
    """What an episode leaves behind, or in a log of trainings each of them."""

    step: int
    metrics: dict[str, float]
    hyperparams: dict[str, float]  # by the names that they have in a log
    seconds: float = 0.0  # of the training, up to here


class Done(NamedTuple):
    """What is known of a training that was done, without its state."""

    judged: dict[str, float]
    hyperparams: dict[str, float]
    gradients: float
    products: float
    seconds: float
    stopped: bool = False  # by an update that was rejected

    @property
    def cost(self) -> Cost:
        """Of the training."""
        return Cost(self.gradients, self.products)


T = TypeVar("T", "LogRow", "Done")


class Journal(Generic[T]):
    """Rows in a file of JSON lines, each there whole or not at all; numbers come back exactly.

    The first line says the format, the kind of the rows and whose they are. Of a file that is
    damaged, or of another run, what is before that is used; the file is set aside before anything
    is written. Reading changes nothing.

    Attributes:
        rows: All of them, those of earlier processes first.
    """

    def __init__(self, kind: type[T], path: Path | None = None, run: str = ""):
        self.rows: list[T] = []
        self._path, self._broken, self._damaged = path, False, False
        self._head = {"format": FORMAT, "rows": kind.__name__, "run": run}
        self._size = 0  # bytes of what is used of the file
        if path is not None and not_a_link(path).exists():
            self._read(kind, path)

    def _read(self, kind: type[T], path: Path) -> None:
        *lines, _ = path.read_bytes().split(b"\n")  # after the last one, what was cut off
        try:
            for line in lines:
                said = _said(line)
                if self._size:
                    self.rows.append(kind(**said))
                elif said != self._head:
                    raise ValueError(f"begins with {said}, and not with {self._head}")
                self._size += len(line) + 1
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            self._damaged = True
            complain(
                f"line {len(self.rows) + bool(self._size) + 1} of {path} is damaged, or none of "
                f"this run and release ({error}): what is before it is used. The file will be "
                f"kept as {name_aside(path).name}.",
                strict=False,
            )

    def add(self, row: T) -> None:
        """One more row. If it cannot be written, no more are: a file has no gaps."""
        self.rows.append(row)
        if self._damaged or not self._size:
            self._try(self._write)
        else:
            self._try(partial(self._append, _line(row._asdict())))

    def cut(self, rows: int) -> None:
        """Keep so many rows, the first ones."""
        dropped = self.rows[rows:]
        del self.rows[rows:]
        if dropped or self._damaged:
            self._try(self._write)

    def _try(self, write: Callable[[Path], None]) -> None:
        if self._path is None or self._broken:
            return
        try:
            write(self._path)
        except OSError as error:
            self._broken = True
            complain(
                f"cannot write to {self._path}: {error.strerror or error}. The run goes on; if it "
                "is cut off, --resume goes on from here at best.",
                strict=False,
            )

    def _append(self, line: bytes, path: Path) -> None:
        _append(path, line, self._size)
        self._size += len(line)

    def _write(self, path: Path) -> None:
        """All of it, and set aside what is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._damaged:
            publish(name_aside(path), partial(shutil.copyfile, path))
        content = b"".join(map(_line, (self._head, *(row._asdict() for row in self.rows))))
        publish(path, lambda path: path.write_bytes(content))
        self._damaged, self._size = False, len(content)


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps({"row": said, "sha256": _digest(said)}).encode() + b"\n"


def _said(line: bytes) -> dict[str, Any]:
    found = json.loads(line)
    if found["sha256"] != _digest(found["row"]):
        raise ValueError("its SHA-256 is another")
    return found["row"]


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _append(path: Path, line: bytes, size: int) -> None:
    """At the end of so many bytes; what is after them had been cut off."""
    follow_no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    number = os.open(path, os.O_WRONLY | os.O_APPEND | follow_no_link | getattr(os, "O_BINARY", 0))
    with open(number, "ab", buffering=0) as file:
        try:
            if os.fstat(number).st_size > size:
                file.truncate(size)
            while line:
                line = line[file.write(line) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
