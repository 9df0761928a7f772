"""Running out of memory, explained."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.errors import JaxRuntimeError

from gradhpo.core.state import BilevelState
from gradhpo.utils.gradients import tree_bytes

__all__ = ["memory_explained"]

REMEDIES = (
    'Give reverse mode memory="segments", which keeps about 2 sqrt(T) states; take a shorter T, '
    "windows of fewer steps or truncate=; or take a method whose memory does not grow with T, such "
    "as one_step or hyperdistill."
)


@contextmanager
def memory_explained(name: str, state: BilevelState, steps: int | None) -> Iterator[None]:
    """Raise MemoryError with bytes and remedies where JAX or NumPy find no memory within.

    Args:
        name: Of the method.
        state: Its inner state is what a method that looks back keeps of every step.
        steps: T; None: not known here.
    """
    try:
        yield
    except (JaxRuntimeError, MemoryError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if type(error) is MemoryError:  # a user's own, or of Python; NumPy's is a class beneath it
            raise
        asked = re.search(r"alloc\w+ ([\d.]+ ?\w*)", str(error))
        size = tree_bytes(state.inner)
        of_all = "" if steps is None else f", those of T={steps} steps {_bytes(steps * size)}"
        raise MemoryError(
            f"{name}: out of memory{_seen(asked)}{_allowed()}. A method that looks back keeps the "
            f"states of its window: one takes {_bytes(size)}{of_all}. {REMEDIES} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _seen(asked: re.Match[str] | None) -> str:
    if asked is None:
        return ""
    number, _, unit = asked[1].partition(" ")
    plain = number.isdecimal() and unit in ("", "bytes")
    return f", at a request for {_bytes(int(number)) if plain else asked[1]}"


def _allowed() -> str:
    """What the device, or the process, may have at all."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = _limit_of_process()
    return "" if limit is None else f" of {_bytes(limit)} that may be had"


def _limit_of_process() -> int | None:
    try:
        import resource  # not on Windows

        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, OSError, ValueError):
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical if soft == resource.RLIM_INFINITY else min(soft, physical)


def _bytes(count: int) -> str:
    """
    >>> _bytes(4000), _bytes(8_012_000_312)
    ('4.0 kB', '8.0 GB')
    """
    value, units = float(count), iter(("kB", "MB", "GB", "TB"))
    unit = "bytes"
    while value >= 1000 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
