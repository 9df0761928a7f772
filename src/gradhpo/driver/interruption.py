"""A run that ends early hands back its last good state."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from gradhpo.core.state import BilevelState

__all__ = ["Kept", "handing_back", "patient_interrupts"]


class Kept:
    """The newest state of a run, and the newest one that is known to have been computed."""

    def __init__(self, state: BilevelState):
        self.good = self.newest = state
        self.first = state

    def put(self, state: BilevelState) -> None:
        """The state after an episode; its computation may still run, or fail."""
        self.newest = state

    def wait(self) -> None:
        """Until the newest state is there, or its error is raised."""
        self.good = jax.block_until_ready(self.newest)

    def rescue(self) -> BilevelState:
        """The newest state that can be had."""
        with suppress(Exception):
            self.wait()
        return self.good


@contextmanager
def handing_back(kept: Kept) -> Iterator[None]:
    """Attach the last good state to whatever is raised within, as `error.state`."""
    try:
        yield
    except BaseException as error:
        with suppress(AttributeError):  # an exception with slots
            error.state = state = kept.rescue()  # type: ignore[attr-defined]
            if state is not kept.first:
                error.add_note(
                    f"gradhpo: the state after episode {int(state.episode)} is in error.state; "
                    "run(error.state, ...) goes on from it."
                )
        raise


@contextmanager
def patient_interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises KeyboardInterrupt where it comes.

    Outside of the main thread, the only one that signals reach, and where Ctrl-C has another
    handler already, nothing changes.
    """
    heard = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield heard
        return

    def handle(number, frame):
        if heard.is_set():
            signal.default_int_handler(number, frame)
        heard.set()
        if sys.stderr is not None and sys.stderr.isatty():
            print("\nfinishing the episode; Ctrl-C again stops at once", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
