"""Metric loggers: JSON lines, CSV, TensorBoard and a progress line.

    with MultiLogger(JSONLinesLogger("run/metrics.jsonl"), ProgressLogger(total=60)) as logger:
        state = optimizer.run(state, M=60, logger=logger, ...)

A target that fails (disk full, broken pipe) does not stop the run: the logger warns once, with a
RuntimeWarning, and keeps the records from then on in `logger.records`.
"""

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from gradhpo.utils._loggers import FileLogger, Record, printable, to_float
from gradhpo.utils._progress import ProgressLogger
from gradhpo.utils._tensorboard import TensorBoardLogger

__all__ = [
    "CSVLogger",
    "JSONLinesLogger",
    "MetricLogger",
    "MultiLogger",
    "ProgressLogger",
    "TensorBoardLogger",
    "log_callback",
    "printable",
]


@runtime_checkable
class MetricLogger(Protocol):
    """Anything with these two methods. Those below are context managers as well."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers, or arrays with one element, at a step."""
        ...

    def close(self) -> None:
        """Finish; a second call does nothing."""
        ...


class JSONLinesLogger(FileLogger):
    """Appends one JSON object per record, `{"step": 1, "val_loss": 0.5}`, to a file.

    The file and its parent directories are created when missing. NaN and infinity become null.

    Raises:
        IsADirectoryError: `path` is a directory.
        OSError: the file cannot be opened.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run/metrics.jsonl"
    >>> with JSONLinesLogger(path) as logger:
    ...     logger.log({"val_loss": 0.5}, step=1)
    >>> Path(path).read_text()
    '{"step": 1, "val_loss": 0.5}\\n'
    """

    def _write(self, record: Record) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._append(json.dumps(finite, allow_nan=False) + "\n")

    def _step_of(self, line: bytes) -> int | None:
        try:
            return int(json.loads(line)["step"])
        except (KeyError, TypeError, ValueError):
            return None


class CSVLogger(FileLogger):
    """Appends one row per record to a file; its columns are the step and the first metrics.

    The columns stay those of the first record, or of the file that is continued. A metric that
    appears later is left out, with one RuntimeWarning; one that is missing leaves its cell empty.

    Raises:
        IsADirectoryError: `path` is a directory.
        ValueError: the file exists and its first column is not `step`.
        OSError: the file cannot be opened.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/metrics.csv"
    >>> with CSVLogger(path) as logger:
    ...     logger.log({"val_loss": 0.5}, step=1)
    >>> Path(path).read_text()
    'step,val_loss\\n1,0.5\\n'
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._columns: list[str] = []
        self._warned = False
        if self.path.is_file():
            self._columns = _first_row(self.path)
        if self._columns and self._columns[0] != "step":
            self._file.close()
            raise ValueError(f"{self._target} exists and is not a log: no column `step`.")

    def _write(self, record: Record) -> None:
        columns = self._columns or list(record)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._columns:
            writer.writerow(columns)
        writer.writerow([record.get(key, "") for key in columns])
        self._append(text.getvalue())
        self._columns = columns
        extra = [key for key in record if key not in columns]
        if extra and not self._warned:
            self._warned = True
            message = f"{self._target} has no column for {', '.join(extra)}: left out from now on."
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _step_of(self, line: bytes) -> int | None:
        first = line.partition(b",")[0].strip()
        return int(first) if first.isdigit() else None


def _first_row(path: Path) -> list[str]:
    """The columns of a log; of a file of another kind one that is none."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return next(csv.reader(file), [])
        except (csv.Error, UnicodeDecodeError):
            return ["no text"]


class MultiLogger:
    """Passes every record on to several loggers and closes them all.

    >>> with MultiLogger(ProgressLogger(disable=True)) as logger:
    ...     logger.log({"val_loss": 0.5}, step=1)
    """

    def __init__(self, *loggers: MetricLogger) -> None:
        self._loggers = loggers

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record the metrics with each of the loggers."""
        for logger in self._loggers:
            logger.log(metrics, step)

    def rewind(self, step: int) -> None:
        """Take back the records of later steps, from those loggers that can: files."""
        for logger in self._loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(step)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close each of the loggers, even if one of them fails to."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def log_callback(logger: MetricLogger, every: int = 1) -> Callable[[int, Any], None]:
    """A callback for `run(callback=...)` that logs `state.metadata`, with the episode as step.

    Entries of the metadata that are not single numbers (a user's own arrays or keys) are left out.

    Args:
        logger: Where to log; closing it is up to the caller.
        every: Log each so many episodes. Every record waits for the device to finish the episode.

    Raises:
        ValueError: `every` is below 1.

    >>> from types import SimpleNamespace
    >>> with ProgressLogger(disable=True) as logger:
    ...     callback = log_callback(logger, every=10)
    ...     callback(10, SimpleNamespace(metadata={"val_loss": 0.5}))
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}.")

    def callback(episode: int, state: Any) -> None:
        if episode % every == 0:
            numbers = {}
            for key, value in state.metadata.items():
                with suppress(TypeError):
                    numbers[key] = to_float(value)
            logger.log(numbers, episode)

    return callback
