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

LOCK, HOLDER = ".gradhpo.lock", ".gradhpo.holder"


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
        raise DirectoryBusy(f"{_who(directory, _read(holder))} {_OTHER}") from None
    except OSError as error:
        raise type(error)(f"cannot lock {directory / LOCK}: {error.strerror}.") from None
    try:
        if not takeover and (found := _read(holder)) and not _ended(found):
            raise DirectoryBusy(
                f"{_who(directory, found)} {_OTHER} If that process is known to have ended, "
                f"remove {holder}, or in Python give takeover=True."
            )
        me = _me()
        _write(holder, me)
        try:
            yield
        finally:
            if _read(holder) == me:  # else another was told to take over
                for path in (holder, directory / LOCK):  # who has opened the latter opens another
                    with suppress(OSError):
                        path.unlink()
    finally:
        lock.release()


_OTHER = "Choose another directory, or wait."


def _require_filelock() -> Any:
    try:
        import filelock
    except ImportError as error:
        raise ImportError('checkpoints need more packages: pip install ".[checkpoint]"') from error
    return filelock


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": platform.node(),
        "machine": _machine(),
        "boot": _boot(),
        "started": _start_of(pid),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str | None:
    """Machines of one name may share a disk."""
    with suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return None


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
    names = found.get("host"), found.get("machine")
    here, boot = names == (platform.node(), _machine()), _boot()
    if found.get("boot") != boot:
        return here  # this machine has been started anew since
    if not here:
        return boot is not None  # a container of this machine: the lock reaches it
    pid, started = found.get("pid"), found.get("started")
    if pid == os.getpid() or not isinstance(pid, int):
        return True  # this process let it go, or the file is none of ours: the lock was free
    return started is None or _start_of(pid) != started  # else somebody has removed its lock


def _who(directory: Path, found: dict[str, Any]) -> str:
    if not found:
        return f"another process is writing to {directory}."
    pid, host, since = (ascii(found.get(name)).strip("'") for name in ("pid", "host", "since"))
    return f"process {pid} on {host} has been writing to {directory} since {since}."


def _read(holder: Path) -> dict[str, Any]:
    """What the file says; nothing, if it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        if holder.is_file() and not holder.is_symlink():
            with holder.open("rb") as stream:
                found = json.loads(stream.read(4096))
            return found if isinstance(found, dict) else {}
    return {}


def _write(holder: Path, content: dict[str, Any]) -> None:
    holder.unlink(missing_ok=True)
    with holder.open("x") as stream:  # which follows no link
        stream.write(json.dumps(content) + "\n")
