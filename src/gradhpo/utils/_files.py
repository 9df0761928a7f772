"""Files that are there whole, old or new, whatever is cut off."""

import os
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["flush", "name_aside", "not_a_link", "publish", "whose"]


def publish(path: Path, make: Callable[[Path], object]) -> None:
    """Write a file through a temporary neighbour, so that no reader ever sees half of it.

    Args:
        make: Writes to the path that it is given, which has the same suffix.

    Raises:
        OSError: naming `path`; what was there before still is.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.unlink(missing_ok=True)  # what lies there may be a link that leads elsewhere
    try:
        make(temporary)
        flush(temporary)  # or a crash may leave the new name on an empty file
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names none
    finally:
        temporary.unlink(missing_ok=True)


def whose(path: Path) -> str:
    """The name of a file, or of the one that `publish` was writing when it was cut off."""
    return re.sub(r"^\.\d+\.", "", path.name)


def flush(path: Path) -> None:
    """A file, or the names in a directory, to the disk, so that a power failure finds it there."""
    windows = os.name == "nt"  # flushes what can be written to, and directories by itself
    if windows and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def not_a_link(path: Path) -> Path:
    """The path, which leads nowhere else.

    Raises:
        NotADirectoryError: it is a link.
    """
    if path.is_symlink():
        raise NotADirectoryError(f"{path} is a link, and would lead elsewhere: remove it.")
    return path


def name_aside(path: Path) -> Path:
    """A free name beside it, under which what is damaged is kept and not read again."""
    for count in range(1000):
        aside = path.with_name(f"{path.name}.damaged{f'-{count}' if count else ''}")
        if not os.path.lexists(aside):
            return aside
    raise FileExistsError(f"{path} has been found damaged a thousand times.")
