"""Ctrl-C that is obeyed while compiled code runs."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "prompt_interrupts"]

INTERRUPTED = 130
"""The exit status of a program that was interrupted: 128 + SIGINT, as shells have it."""


@contextmanager
def prompt_interrupts(message: str, grace: float = 1.0) -> Iterator[None]:
    """Let Ctrl-C end the process within `grace` seconds, whatever it is doing.

    Python raises KeyboardInterrupt in the main thread when the running call returns. A
    compilation, or a compiled program of many episodes, returns after up to half a minute, and so
    does a thread that is in one. Here another thread hears of the signal at once. Where the
    `with` block, and the threads started in it, have not ended after `grace` seconds, it prints
    `message` and ends the process with status `INTERRUPTED`, without clean-up.

    Does nothing outside of the main thread, the only one that signals reach.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        while heard := hears.recv(1):  # the number of a signal; nothing once `tells` is closed
            if heard[0] == signal.SIGINT and not ended.wait(grace):
                print(message, file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)

    watcher = threading.Thread(target=watch, name="gradhpo-interrupts", daemon=True)
    watcher.start()
    others = set(threading.enumerate())
    try:
        yield
    finally:
        # Threads that still run would hold up the exit of the interpreter, unwatched.
        for thread in set(threading.enumerate()) - others:
            if not thread.daemon:
                thread.join()
        ended.set()
        signal.set_wakeup_fd(before)
        tells.close()
        watcher.join()
        hears.close()
