"""One writer for a directory.

The lock itself is the operating system's, which ends with the process that holds it; a file beside
it says who that is. A file left by a process of this machine that has ended is no obstacle. One of
another machine is, whatever its age: on a shared disk, locks need not reach from one to the other.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gradhpo.checkpoint.errors import DirectoryBusy

__all__ = ["only_writer"]

LOCK, HOLDER = ".lock", "holder.json"


@contextmanager
def only_writer(directory: Path, takeover: bool = False) -> Iterator[None]:
    """Be the one that writes to a directory, or say at once who is.

    Args:
        takeover: Whether a holder on another machine is known to have ended.

    Raises:
        DirectoryBusy: names the holder's process, machine and start.
    """
    filelock = _require_filelock()
    lock = filelock.FileLock(directory / LOCK, timeout=0)
    holder = directory / HOLDER
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _busy(directory, _read(holder)) from None
    try:
        if not takeover and (found := _read(holder)) and not _ended(found):
            raise _busy(directory, found)
        _write(holder, _me())
        try:
            yield
        finally:
            with suppress(OSError):
                holder.unlink()
    finally:
        lock.release()


def _require_filelock() -> Any:
    try:
        import filelock
    except ImportError as error:
        raise ImportError(
            'checkpoints need more packages: pip install "gradhpo[checkpoint]"'
        ) from error
    return filelock


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": platform.node(),
        "boot": _boot(),
        "started": _start_of(pid),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _boot() -> str | None:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did: a number that is used again
    names another process."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _ended(found: dict[str, Any]) -> bool:
    """Whether there is evidence, beside the lock that was free, that a holder has ended."""
    if found.get("host") != platform.node():
        return False
    if found.get("boot") != _boot():
        return True
    pid, started = found.get("pid"), found.get("started")
    if pid == os.getpid() or not isinstance(pid, int):
        return True  # this process let it go, or the file is none of ours: the lock was free
    return started is None or _start_of(pid) != started


def _busy(directory: Path, found: dict[str, Any]) -> DirectoryBusy:
    if not found:
        return DirectoryBusy(f"another process is writing to {directory}; choose another.")
    return DirectoryBusy(
        f"process {found.get('pid')} on {found.get('host')} has been writing to {directory} since "
        f"{found.get('since')}. Choose another directory, or wait. If that process is known to "
        f"have ended, remove {directory / HOLDER}."
    )


def _read(holder: Path) -> dict[str, Any]:
    """What the file says; nothing, if it is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads(holder.read_bytes()[:4096])
        return found if isinstance(found, dict) else {}
    return {}


def _write(holder: Path, content: dict[str, Any]) -> None:
    temporary = holder.with_name(f".{content['pid']}.{HOLDER}")
    temporary.write_text(json.dumps(content) + "\n")
    os.replace(temporary, holder)
