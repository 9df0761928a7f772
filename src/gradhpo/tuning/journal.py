"""What a command remembers of episodes and trainings, a line for each."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from gradhpo.core.estimator import Cost
from gradhpo.utils._files import publish
from gradhpo.utils.validation import complain

__all__ = ["Done", "Journal", "LogRow"]


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

    Attributes:
        rows: All of them, those of earlier processes first: up to the first line that is cut off or
            damaged.
    """

    def __init__(self, kind: type[T], path: Path | None = None):
        self._path, self._broken = path, False
        self.rows: list[T] = []
        if path is not None and path.exists():
            with path.open("rb") as lines:
                self.rows = list(_rows(kind, lines))
            self.cut(len(self.rows))

    def add(self, row: T) -> None:
        """One more row. If it cannot be written, no more are: a file has no gaps."""
        self.rows.append(row)
        if self._path is None or self._broken:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, _line(row))
        except OSError as error:
            self._broken = True
            complain(
                f"cannot write to {self._path}: {error.strerror or error}. The run goes on; if it "
                "is cut off, --resume goes on from here at best.",
                strict=False,
            )

    def cut(self, rows: int) -> None:
        """Keep so many rows, the first ones."""
        del self.rows[rows:]
        content = b"".join(map(_line, self.rows))
        if self._path is not None and self._path.exists() and self._path.read_bytes() != content:
            publish(self._path, lambda path: path.write_bytes(content))


def _line(row: LogRow | Done) -> bytes:
    said = json.dumps(row._asdict())
    return json.dumps({"row": row._asdict(), "sha256": _digest(said)}).encode() + b"\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(kind: type[T], lines: Iterable[bytes]) -> Iterator[T]:
    for line in lines:
        try:
            row = kind(**json.loads(line)["row"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return
        if _line(row) != line:
            return
        yield row


def _append(path: Path, line: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            with suppress(OSError):
                file.truncate(start)
            raise
