"""Ctrl-C that is obeyed while compiled code runs."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["INTERRUPTED", "prompt_interrupts"]

INTERRUPTED = 130
"""The exit status of a program that was interrupted: 128 + SIGINT, as shells have it."""


@contextmanager
def prompt_interrupts(message: str, grace: float = 1.0) -> Iterator[None]:
    """Let Ctrl-C end the process within `grace` seconds, with `message` and status `INTERRUPTED`.

    Python raises KeyboardInterrupt when the call that runs returns, and a compilation, or a
    compiled program of many episodes, returns after up to half a minute. So another thread waits
    for the signal, and ends the process if the `with` block has not been left `grace` seconds after
    it. If the block has been left, its clean-up is done, and the process ends at once: the usual
    exit of the interpreter would wait for compiled programs that still run in other threads, or
    crash on them.

    A KeyboardInterrupt that was not raised by a signal passes through. Does nothing outside of the
    main thread, the only one that signals reach, nor if Ctrl-C has another handler already.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard, left = threading.Event(), threading.Event()
    hears, tells = socket.socketpair()
    tells.setblocking(False)

    def handle(number, frame):
        heard.set()
        signal.default_int_handler(number, frame)

    def watch() -> None:
        while number := hears.recv(1):  # a signal's number as soon as it comes; empty at the end
            if number[0] == signal.SIGINT and not left.wait(grace):
                _end(message)

    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="gradhpo-interrupts", daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if heard.is_set():
            with suppress(OSError, ValueError):  # a closed pipe
                sys.stdout.flush()
            _end(message)
        raise
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tells.close()
        watcher.join()
        hears.close()


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
