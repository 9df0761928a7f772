"""Scalars for TensorBoard, through tensorboardX's record writer."""

import os
import time
from pathlib import Path
from typing import Any

from gradhpo.utils._loggers import Logger, Record

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(Logger):
    """Writes scalars as TensorBoard events to a new file in `logdir`, created when missing.

    Each record is on the disk when `log` returns.

    Raises:
        ImportError: tensorboardX is missing; the message has the command that installs it.
        OSError: `logdir` is a file or cannot be written to.

    >>> import tempfile
    >>> with TensorBoardLogger(tempfile.mkdtemp()) as logger:
    ...     logger.log({"val_loss": 0.5}, step=1)
    """

    def __init__(self, logdir: str | Path) -> None:
        try:
            from tensorboardX.record_writer import RecordWriter
        except ImportError as error:
            message = 'TensorBoardLogger needs tensorboardX: pip install ".[log]"'
            raise ImportError(message) from error
        directory = Path(logdir).absolute()
        super().__init__(str(directory))
        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX.SummaryWriter would hand events to a thread; when that dies on a full disk,
        # its queue fills up and training hangs. So this writes the records by itself.
        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}.{time.perf_counter_ns()}"
        self._writer = RecordWriter(str(directory / name))
        self._write_event(file_version="brain.Event:2")

    def _write(self, record: Record) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        step = int(record["step"])
        metrics = {key: value for key, value in record.items() if key != "step"}
        values = [Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        self._write_event(step=step, summary=Summary(value=values))
        self._writer.flush()

    def _write_event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _finish(self) -> None:
        self._writer.close()
