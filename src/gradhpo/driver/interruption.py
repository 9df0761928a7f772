"""A run that ends early hands back its last good state."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from gradhpo.core.state import BilevelState
from gradhpo.utils._interrupts import TERMINATED, Terminated, terminate

__all__ = ["Kept", "Signals", "Terminated", "handing_back", "patient_signals"]

GRACE = 0.5  # seconds
FINISHING = b"\nfinishing the episode; Ctrl-C again stops at once\n"


class Kept:
    """The newest state of a run, and the newest one that is known to have been computed."""

    def __init__(self, state: BilevelState):
        self.good = self.newest = state
        self.first = state

    def begin(self, state: BilevelState) -> None:
        """Go on from another state than the first, one that is there."""
        self.first = self.good = self.newest = state

    def put(self, state: BilevelState) -> None:
        """The state after an episode; its computation may still run, or fail."""
        self.newest = state

    def wait(self) -> None:
        """Until the newest state is there, or its error is raised."""
        self.good = jax.block_until_ready(self.newest)

    def rescue(self, grace: float = math.inf) -> BilevelState:
        """The newest state that can be had, in so many seconds."""
        end = time.monotonic() + grace
        while not _is_ready(self.newest) and time.monotonic() < end:
            time.sleep(0.01)
        if _is_ready(self.newest):
            with suppress(Exception):
                self.wait()
        return self.good


def _is_ready(state: BilevelState) -> bool:
    """Whether it has been computed, or has failed."""
    try:
        # Typed PRNG keys do not say it; they come from the same program as the others.
        arrays = [x for x in jax.tree.leaves(state) if hasattr(x, "is_ready")]
        return all(x.is_deleted() or x.is_ready() for x in arrays)  # the first guards the second
    except RuntimeError:  # donated by the user
        return True


@contextmanager
def handing_back(kept: Kept, signals: "Signals") -> Iterator[None]:
    """Attach the last good state to whatever is raised within, as `error.state`; after a second
    signal without waiting long for what still runs."""
    try:
        yield
    except BaseException as error:
        with suppress(AttributeError):  # an exception with slots
            error.state = state = kept.rescue(GRACE if signals.twice else math.inf)  # type: ignore[attr-defined]
            if state is not kept.first:
                error.add_note(
                    f"gradhpo: the state after episode {int(state.episode)} is in error.state; "
                    "run(error.state, ...) goes on from it."
                )
        raise


class Signals:
    """What the process has been told while a run was on."""

    def __init__(self) -> None:
        self.heard: type[KeyboardInterrupt] | None = None
        self.twice = False

    def obey(self) -> None:
        """Raise what was put off.

        Raises:
            KeyboardInterrupt: after Ctrl-C; `Terminated` after SIGTERM.
        """
        if self.heard is Terminated:
            raise Terminated(TERMINATED)
        if self.heard is not None:
            raise self.heard


@contextmanager
def patient_signals(signals: Signals, terminations: bool = False) -> Iterator[None]:
    """Note the first Ctrl-C; the second is raised where it comes, or the first one at the end.

    Args:
        terminations: Whether that is done with SIGTERM as well, which otherwise ends the process at
            once: right for a run that saves its state. Where it is raised, it is noted anyway.

    Outside of the main thread, the only one that signals reach, nothing changes, nor for a signal
    that has another handler already.
    """
    own: dict[signal.Signals, Any] = {
        signal.SIGINT: (signal.default_int_handler, KeyboardInterrupt)
    }
    if signal.getsignal(signal.SIGTERM) is terminate:
        own[signal.SIGTERM] = (terminate, Terminated)
    elif terminations:
        own[signal.SIGTERM] = (signal.SIG_DFL, Terminated)
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, (handler, _) in own.items() if signal.getsignal(number) is handler]

    def handle(number, frame):
        del frame
        signals.twice, signals.heard = signals.heard is not None, own[number][1]
        if signals.twice:
            signals.obey()
        with suppress(OSError, ValueError):  # `print` might be in the middle of a line, and raise
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(sys.stderr.fileno(), FINISHING)

    if not in_main:
        ours = []
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    except Exception as error:  # a script that catches it would go on as if nobody had asked
        try:
            signals.obey()
        except KeyboardInterrupt as heard:
            heard.add_note(f"gradhpo: {type(error).__name__}: {error}")
            raise heard from error
        raise
    finally:
        for number in ours:
            signal.signal(number, own[number][0])
    signals.obey()
