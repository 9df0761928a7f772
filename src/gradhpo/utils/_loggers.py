"""What every metric logger does: it takes plain floats and survives a target that fails."""

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["FileLogger", "Logger", "Record", "printable", "to_float"]

Record = dict[str, float]


def printable(text: str) -> str:
    """The text on one line, with control and other unprintable characters escaped.

    >>> print(printable("loss\\x1b[31m\\n"))
    loss\\x1b[31m\\n
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class Logger:
    """Base of the loggers: `_write` and `_finish` do the work and may raise OSError.

    Attributes:
        records: What could not be written, oldest first; empty while all goes well.
    """

    def __init__(self, target: str) -> None:
        self.records: list[Record] = []
        self._target = printable(target)
        self._closed = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers, or arrays with one element, at a step.

        Raises:
            TypeError: a value is not a number; the message names its key.
            ValueError: a metric is called "step", or the logger is closed.
        """
        self._check_open()
        if "step" in metrics:
            raise ValueError('"step" is the name of the step itself; rename the metric.')
        record = {"step": int(step)}
        record |= {printable(key): _named_float(key, value) for key, value in metrics.items()}
        if self.records:  # a target that failed is not tried again
            self.records.append(record)
            return
        try:
            self._write(record)
        except OSError as error:
            self.records.append(record)
            self._warn(error)

    def close(self) -> None:
        """Finish; a second call does nothing."""
        if not self._closed:
            self._closed = True
            try:
                self._finish()
            except OSError as error:
                if not self.records:
                    self._warn(error)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the logger of {self._target} is closed: make another.")

    def _write(self, record: Record) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Nothing to finish."""

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"cannot log to {self._target} any more ({error.strerror or error}); later records "
            "stay in memory, in `logger.records`.",
            RuntimeWarning,
            stacklevel=3,  # the line that called `log` or `close`
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class FileLogger(Logger):
    """A logger that appends lines to a file, each complete or absent.

    Attributes:
        path: The file, absolute: it stays the same when the process changes directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        super().__init__(str(self.path))
        if self.path.is_dir():
            raise IsADirectoryError(f"{self._target} is a directory; name a file in it.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(self.path, "a")  # unbuffered: a failed write fails at its own record
        if self.path.is_file() and not _ends_a_line(self.path):  # an earlier run was killed
            self._append("\n")

    def rewind(self, step: int) -> None:
        """Take the last records back, those of later steps: a run goes on from a checkpoint of this
        step. What another run has written before them stays.

        Raises:
            ValueError: the logger is closed.
            OSError: the file cannot be read or cut.
        """
        self._check_open()
        if not self.path.is_file():  # a pipe, a device
            return
        end, last, position = None, math.inf, 0  # where the later ones begin that end the file
        with self.path.open("rb") as lines:
            for line in lines:
                found = self._step_of(line)
                if found is not None and found > step:
                    begins = end is None or found <= last  # the steps of a run grow
                    end, last = (position if begins else end), found
                elif found is not None:
                    end = None
                position += len(line)
        if end is not None:
            os.ftruncate(self._file.fileno(), end)

    def _step_of(self, line: bytes) -> int | None:
        """That of a record; None: the line is none."""
        raise NotImplementedError

    def _append(self, text: str) -> None:
        start = os.fstat(self._file.fileno()).st_size
        data = text.encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with suppress(OSError):  # a pipe cannot be shortened
                os.ftruncate(self._file.fileno(), start)
            raise

    def _finish(self) -> None:
        self._file.close()


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        return stream.read() in (b"", b"\n")


def to_float(value: Any) -> float:
    """A number, or an array with one element, as a float.

    Raises:
        TypeError: `value` is something else.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is no number, not even when it reads like one")
        return float(np.asarray(value).item())
    except (TypeError, ValueError):
        seen, shape = type(value).__name__, getattr(value, "shape", None)
        seen += "" if shape is None else f" of shape {shape}"
        raise TypeError(f"needs a number or an array with one element, not {seen}.") from None


def _named_float(key: str, value: Any) -> float:
    try:
        return to_float(value)
    except TypeError as error:
        raise TypeError(f"metric {key!r} {error}") from None
