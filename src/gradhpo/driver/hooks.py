"""What looks on after every episode: the user's callback, loggers, the progress line.

A hook is a function `(episode, state)` of the number of the episode, counted from 1 over all runs,
and of the state after it with `state.params = w_T`. It ends the run by returning False or raising
`StopRun`. One with a method `resumed(state)` is told by it what checkpoint a run goes on from; one
with `take_back(state)`, before that, if it may have been told of later episodes by a process that
was cut off.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np

from gradhpo.core.state import BilevelState
from gradhpo.core.types import Hyper
from gradhpo.utils._loggers import to_float
from gradhpo.utils.logging import MetricLogger, ProgressLogger

__all__ = ["Hook", "Progress", "StopRun", "Log", "stops"]

Hook = Callable[[int, BilevelState], Any]


class StopRun(Exception):
    """Raised by a callback to end the run after this episode; `run` returns the state."""


def stops(hook: Hook, episode: int, state: BilevelState) -> bool:
    """Call a hook. Does it want the run to end? By False, as Python, NumPy or JAX have it, or by
    `StopRun`."""
    try:
        answer = hook(episode, state)
    except StopRun:
        return True
    if not isinstance(answer, bool | np.bool_ | np.ndarray | jax.Array):
        return False
    answer = np.asarray(answer)
    return answer.ndim == 0 and answer.dtype == np.bool_ and not answer


class Log:
    """A hook that logs the metrics and the hyperparameters, under the step `state.step`.

    Args:
        natural: The hyperparameters as they shall be logged; None: as they are stored.
    """

    def __init__(self, logger: MetricLogger, natural: Callable[[Hyper], Any] | None = None):
        self._logger, self._natural = logger, natural

    def __call__(self, episode: int, state: BilevelState) -> None:
        del episode
        metadata, lam, step = _on_host(state, self._natural)
        self._logger.log(numbers(metadata) | scalars("hyperparams", lam), int(step))

    def take_back(self, state: BilevelState) -> None:
        """Records of later steps are taken back, by loggers that can: they come again."""
        rewind = getattr(self._logger, "rewind", None)
        if rewind is not None:
            rewind(int(state.step))


def _on_host(state: BilevelState, natural: Callable[[Hyper], Any] | None) -> tuple[Any, Any, Any]:
    lam = state.hyperparams if natural is None else natural(state.hyperparams)
    return jax.device_get((state.metadata, lam, state.step))


def numbers(metadata: Any) -> dict[str, float]:
    """The entries that are single numbers."""
    found = {}
    for name, value in metadata.items():
        with suppress(TypeError):
            found[name] = to_float(value)
    return found


SUMMARIES = {"mean": np.mean, "min": np.min, "max": np.max}


def scalars(name: str, tree: Any, of: tuple[str, ...] = tuple(SUMMARIES)) -> dict[str, float]:
    """The leaves of a tree by name; of a leaf with several numbers its mean, least and largest.

    >>> scalars("hyperparams", {"rate": 0.5, "decay": np.arange(3.0)})["hyperparams/decay/mean"]
    1.0
    """
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = "/".join([name, *(jax.tree_util.keystr((key,), simple=True) for key in path)])
        values = np.asarray(leaf)
        if values.size == 1:
            found[path] = float(values.item())
        elif values.size:
            found |= {f"{path}/{word}": float(SUMMARIES[word](values)) for word in of}
    return found


class Progress:
    """The progress line of a run on stderr, with the updates rejected so far by name; a hook.

    Args:
        episodes: Of this run.
        first: The number of episodes before it.
        show: Whether there is a line; None: where stderr is a terminal.
        natural: The hyperparameters as they shall be shown; None: as they are stored.
    """

    EVERY = 0.1  # seconds between two looks at the metrics, each of which waits for the device
    PATIENCE = 1.0  # seconds before a compilation is mentioned
    ROOM = 4  # numbers of the hyperparameters: more do not fit into a line

    def __init__(
        self,
        episodes: int,
        first: int,
        show: bool | None,
        natural: Callable[[Hyper], Any] | None = None,
    ):
        if show is None:
            show = sys.stderr is not None and sys.stderr.isatty()
        self.last, self.first, self.show, self.due = first + episodes, first, show, 0.0
        self.natural, self.logger = natural, ProgressLogger(total=episodes, disable=not show)

    def __call__(self, episode: int, state: BilevelState) -> None:
        if not self.show or (time.monotonic() < self.due and episode < self.last):
            return
        metadata, lam, _ = _on_host(state, self.natural)
        metrics = numbers(metadata)
        losses = {name: x for name, x in metrics.items() if name in ("train_loss", "val_loss")}
        counts = state.status_counts.items()
        rejected = {f"rejected/{code.name}": n for code, n in counts if code.rejects}
        values = scalars("lam", lam, of=("min", "max")).items()
        single_first = sorted(values, key=lambda each: each[0].endswith(("/min", "/max")))
        values = dict(single_first[: self.ROOM])
        self.logger.log((losses or metrics) | rejected | values, episode - self.first)
        self.due = time.monotonic() + self.EVERY

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Say so if what happens within takes long."""
        if not self.show:
            yield
            return
        timer = threading.Timer(
            self.PATIENCE, print, ("compiling ...",), {"file": sys.stderr, "flush": True}
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """Leave the line as it is."""
        self.logger.close()
