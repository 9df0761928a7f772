"""The progress line: a tqdm bar where one can be drawn, plain lines elsewhere."""

import math
import sys
import time
from typing import Any

from gradhpo.utils._loggers import Logger, Record

__all__ = ["ProgressLogger"]


class ProgressLogger(Logger):
    """Shows the latest metrics on stderr: a tqdm bar, or now and then a plain line.

    The bar appears where tqdm is installed and stderr is a terminal or a notebook. Elsewhere,
    such as in a log file, the first and the last record and one every `every` seconds are lines.

    Args:
        total: Number of steps, if known.
        every: Seconds between plain lines.
        disable: Print nothing at all.

    >>> with ProgressLogger(total=60, disable=True) as logger:
    ...     logger.log({"val_loss": 0.5}, step=1)
    """

    def __init__(
        self, total: int | None = None, every: float = 10.0, disable: bool = False
    ) -> None:
        super().__init__("stderr")
        self._total = total
        self._every = every
        self._disable = disable or sys.stderr is None  # None: a windowed program
        self._bar = None if self._disable else _new_bar(total)
        self._due = -math.inf
        self._waiting: Record | None = None  # the latest record, if it is not on the screen

    def _write(self, record: Record) -> None:
        if self._disable:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(_metrics(record), refresh=False)
            self._bar.update(record["step"] - self._bar.n)
            return
        self._waiting = record
        if time.monotonic() >= self._due:
            self._finish()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._waiting is not None:
            of = "" if self._total is None else f"/{self._total}"
            step = f"step {self._waiting['step']:.0f}{of}"
            print(step, _metrics(self._waiting), file=sys.stderr, flush=True)
            self._waiting, self._due = None, time.monotonic() + self._every


def _metrics(record: Record) -> str:
    """The metrics as text, losses and accuracies first: a bar cuts off what is too long."""
    first = [key for key in record if "loss" in key or "accuracy" in key]
    keys = dict.fromkeys([*first, *record])
    return " ".join(f"{key}={record[key]:.4g}" for key in keys if key != "step")


def _new_bar(total: int | None) -> Any:
    """A tqdm bar, or None where it is missing or stderr shows only whole lines."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not (sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, dynamic_ncols=True, file=sys.stderr)
