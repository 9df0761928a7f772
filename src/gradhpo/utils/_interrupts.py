"""Ctrl-C, and the signal to terminate, obeyed while compiled code runs."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

__all__ = ["INTERRUPTED", "TERMINATED", "Terminated", "prompt_interrupts", "terminate"]

INTERRUPTED, TERMINATED = 130, 143
"""The exit statuses of a program that was interrupted, or terminated: 128 + the signal, as shells
have it."""


class Terminated(SystemExit, KeyboardInterrupt):
    """SIGTERM: what keeps its results after Ctrl-C does so now, and the process ends with 143."""


def terminate(number: int, frame: Any) -> NoReturn:
    """A handler for SIGTERM, as `signal.default_int_handler` is one for SIGINT.

    Raises:
        Terminated: always.
    """
    raise Terminated(TERMINATED)


HEARD = {  # what a line says of them, and the handlers that are replaced
    signal.SIGINT: ("interrupted", signal.default_int_handler),
    signal.SIGTERM: ("terminated", signal.SIG_DFL),
}


@contextmanager
def prompt_interrupts(program: str, grace: float = 1.0, patience: int = 0) -> Iterator[None]:
    """Let Ctrl-C end the process within `grace` seconds, with a line on stderr that begins with the
    name of the program, and status `INTERRUPTED`; SIGTERM likewise, with status `TERMINATED`.

    Python raises KeyboardInterrupt when the call that runs returns, and a compilation, or a
    compiled program of many episodes, returns after up to half a minute. So another thread waits
    for the signal, and ends the process if the `with` block has not been left `grace` seconds after
    it. If the block has been left, its clean-up is done, and the process ends at once: the usual
    exit of the interpreter would wait for compiled programs that still run in other threads, or
    crash on them.

    Args:
        patience: Signals that are only raised, as KeyboardInterrupt or `Terminated`, for a command
            that keeps what there is.

    A KeyboardInterrupt that was not raised by a signal passes through. Does nothing outside of the
    main thread, the only one that signals reach, nor for a signal that has another handler already.
    """
    in_main = threading.current_thread() is threading.main_thread()
    ours = [n for n, (_, handler) in HEARD.items() if signal.getsignal(n) is handler]
    if not (in_main and ours):
        yield
        return
    heard: list[int] = []
    left = threading.Event()
    hears, tells = socket.socketpair()
    tells.setblocking(False)

    def watch() -> None:
        while number := hears.recv(1):  # a signal's number as soon as it comes; empty at the end
            heard.extend(each for each in number if each in ours)
            if len(heard) > patience and not left.wait(grace):
                _end(program, heard[-1])

    if signal.SIGTERM in ours:
        signal.signal(signal.SIGTERM, terminate)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="gradhpo-interrupts", daemon=True)
    watcher.start()
    interrupt = None
    try:
        yield
    except KeyboardInterrupt as error:
        interrupt = error
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        for number in ours:
            signal.signal(number, HEARD[number][1])
        tells.close()
        watcher.join()
        hears.close()
    if interrupt is not None:
        if len(heard) > patience:
            with suppress(OSError, ValueError):  # a closed pipe
                sys.stdout.flush()
            _end(program, heard[-1])
        raise interrupt


def _end(program: str, number: int) -> NoReturn:
    print(f"{program}: {HEARD[signal.Signals(number)][0]}", file=sys.stderr, flush=True)
    os._exit(128 + number)
