"""Reading files, compressed files and archives in memory, without trusting them.

Nothing is ever written to disk. The kind of a file is told by its content, not its name.
Archive members that are absolute, climb with `..`, or are links or devices are
refused, and so is anything larger than `LIMIT` bytes once decompressed, before
memory is taken for it.
"""

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from gradhpo.datasets.dataset import DatasetError

__all__ = ["DAMAGE", "LIMIT", "read_members"]

# The largest set read here, CIFAR-10, takes 0.18 GB decompressed.
LIMIT = 1 << 30
_CHUNK = 1 << 20
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}

# What the standard library raises on damaged input (RuntimeError: encrypted zip).
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class _Limited:
    """A stream that refuses to give more than `LIMIT` bytes in all."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._left = stream, LIMIT

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise DatasetError(f"It holds more than {LIMIT} bytes once decompressed.")
        return data

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(_CHUNK), b""))

    def drain(self) -> None:
        while self.read(_CHUNK):  # gzip and xz check their sums at the end
            pass


def read_members(
    path: Path, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield `(name, contents)` of the wanted files inside one file on disk.

    Args:
        path: A zip or tar archive (plain, gz, bz2 or xz), a single file
            compressed with gz, bz2 or xz (its name loses the suffix), or a
            plain file.
        wanted: Says by member name whether a member is to be read.

    Raises:
        DatasetError: an unsafe member, too large, or an HTML page.
        OSError, EOFError, ...: damaged, see `DAMAGE`.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DatasetError("It is an HTML page, not data: probably a failed download.")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        yield from _zip_members(path, wanted)
        return
    opener = next((o for magic, o in _OPENERS.items() if head.startswith(magic)), None)
    if opener is not None:
        with opener(path, "rb") as stream:
            head = stream.read(512)
    with opener(path, "rb") if opener is not None else path.open("rb") as stream:
        limited = _Limited(stream)
        if head[257:262] == b"ustar":
            yield from _tar_members(limited, wanted)
            limited.drain()
            return
        name = PurePosixPath(path.stem if opener is not None else path.name)
        if wanted(name):
            yield name, limited.read_all()


def _tar_members(stream: _Limited, wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    total = 0
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # pyright: ignore
        for member in archive:
            name = _safe(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise DatasetError(f"Member {member.name!r} is a link or not a plain file.")
            total = _add_size(total, member.size)
            contents = archive.extractfile(member) if _visible(name) and wanted(name) else None
            if contents is not None:
                yield name, contents.read()


def _zip_members(path: Path, wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _safe(member.filename)
            if member.is_dir():
                continue
            # The upper half holds the Unix file type; 0 where it was not recorded.
            if (member.external_attr >> 28) not in (0, 0o10):
                raise DatasetError(f"Member {member.filename!r} is a link or not a plain file.")
            total = _add_size(total, member.file_size)
            if _visible(name) and wanted(name):
                yield name, archive.read(member)  # checks the CRC, reads file_size at most


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name
    if outside or ":" in name.split("/")[0]:  # a Windows drive
        raise DatasetError(f"Member {name!r} points outside of the archive.")
    return path


def _visible(name: PurePosixPath) -> bool:
    return not name.name.startswith(".") and "__MACOSX" not in name.parts


def _add_size(total: int, size: int) -> int:
    if total + size > LIMIT:
        raise DatasetError(f"It declares {total + size} bytes or more; the limit is {LIMIT}.")
    return total + size
