"""A directory of checkpoints: published whole, verified before they are read.

    step-0000000020/          one checkpoint, complete from the moment that it has this name
        SHA256SUMS            of all other files in it, as `sha256sum` writes and checks them
        ...
    step-0000000040.damaged/  set aside
    .unfinished-...           a save that is on, or was cut off; swept away by the next writer
    .gradhpo.lock, .gradhpo.holder   who writes here, see `lock`
    .going-on                 the step of the checkpoint that a run has gone on from

A checkpoint is written under another name, its files are flushed to the disk, and then it is
renamed; so whatever is cut off at any point, the checkpoints before it are untouched.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gradhpo.checkpoint.errors import CheckpointDamaged
from gradhpo.checkpoint.lock import HOLDER, LOCK
from gradhpo.utils._files import flush, name_aside, whose

__all__ = [
    "GOING_ON",
    "is_own",
    "numbers",
    "path_of",
    "prepare",
    "publish",
    "remove",
    "set_aside",
    "sweep",
    "verify",
]

SUMS, UNFINISHED, GOING_ON = "SHA256SUMS", ".unfinished-", ".going-on"
NAME = re.compile(r"step-([0-9]{10,})")
CUT = re.compile(rf"{re.escape(UNFINISHED)}((removed-)?{NAME.pattern}-)?[0-9a-f]{{8}}")
OWN = re.compile(rf"{NAME.pattern}(\.damaged(-\d+)?)?|{CUT.pattern}")
MOST = 1 << 26  # bytes of a list of files or a manifest: those of 200 000 leaves


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of this step is."""
    return directory / f"step-{step:010d}"


def numbers(directory: Path) -> list[int]:
    """The steps of the checkpoints there are, in order, damaged ones among them."""
    with suppress(FileNotFoundError, NotADirectoryError):
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        found = {name: int(match[1]) for name in names if (match := NAME.fullmatch(name))}
        return sorted(n for name, n in found.items() if path_of(directory, n).name == name)
    return []


def prepare(path: str | os.PathLike) -> Path:
    """Create a directory, try it out, and return it as an absolute path.

    Raises:
        ValueError: the path is a URL, or one that Orbax takes for another.
        NotADirectoryError: it, or a parent, is a file.
        OSError: it cannot be created or written to.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text} is no directory of this machine; mount it, and give its path.")
    absolute = Path(path).absolute()
    text = str(absolute)
    if ("\\" in text and os.sep != "\\") or text != text.encode("utf-8", "ignore").decode():
        raise ValueError(
            f"cannot write checkpoints to {ascii(text)}: Orbax takes a name with a backslash, or "
            "one that is not UTF-8, for another. Choose another."
        )
    try:
        new = [folder for folder in (absolute, *absolute.parents) if not folder.exists()]
        absolute.mkdir(parents=True, exist_ok=True)
        for folder in new:
            flush(folder.parent)
        trial = absolute / f"{UNFINISHED}{secrets.token_hex(4)}"
        trial.mkdir()  # trying is the only sure test
        with suppress(FileNotFoundError):  # swept away by the writer that there is
            trial.rmdir()
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"the directory of checkpoints {absolute} is, or lies below, a file; choose another."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(f"cannot write checkpoints to {absolute}: {reason}. Choose another.") from None
    return absolute


def publish(directory: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint by `write`, a function of its directory; nothing is left if it fails."""
    final = path_of(directory, step)
    temporary = directory / f"{UNFINISHED}{final.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        write(temporary)
        (temporary / SUMS).write_text(_sums(temporary), encoding="utf-8", newline="")
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in (*files, "."):
                flush(Path(folder, name))
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(directory)
    return final


def verify(path: Path) -> None:
    """Compare all files with their digests.

    Raises:
        CheckpointDamaged: names the first file that differs.
        OSError: they cannot be read, for a reason outside of them.
    """
    try:
        listed = path / SUMS
        about = listed.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST:
            raise CheckpointDamaged(f"{SUMS} is a link, no file or too large")
        said = listed.read_bytes()
        found = os.fsencode(_sums(path))
    except FileNotFoundError:
        raise CheckpointDamaged(f"{SUMS} is missing") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # says nothing of the checkpoint: no permission, too many open files
        raise CheckpointDamaged(f"cannot be read: {error}") from None
    if said == found:
        return
    said, found = (dict(map(_entry, text.splitlines())) for text in (said, found))
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not the file that was written"
            what = what if name in said else f"is not in {SUMS}"
            shown = ascii(os.fsdecode(name))[1:-1]
            raise CheckpointDamaged(f"{shown} {what}")
    raise CheckpointDamaged(f"{SUMS} is not the file that was written")


def _entry(line: bytes) -> tuple[bytes, bytes]:
    digest, _, name = line.partition(b"  ")
    return (name, digest) if name else (SUMS.encode(), line)


def _sums(path: Path) -> str:
    lines = []
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            file = Path(folder, name)
            relative = file.relative_to(path).as_posix()
            if file.is_symlink() or not (name in folders or file.is_file()):
                raise CheckpointDamaged(f"{ascii(relative)[1:-1]} is a link, or no file")
            if name not in folders and relative != SUMS:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                lines.append(f"{digest}  {relative}\n")
    return "".join(sorted(lines, key=lambda line: line[66:]))


def remove(directory: Path, step: int) -> None:
    """Remove a checkpoint: from the first moment on it has no name that is read."""
    path = path_of(directory, step)
    doomed = directory / f"{UNFINISHED}removed-{path.name}-{secrets.token_hex(4)}"
    with suppress(FileNotFoundError):  # removed by somebody else
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left goes with the next sweep


def set_aside(directory: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it is kept and not read again."""
    path = path_of(directory, step)
    aside = name_aside(path)
    os.rename(path, aside)
    return aside


def is_own(path: Path) -> bool:
    """Whether a writer has left this in its directory: a checkpoint, one that is set aside or cut
    off, or a file of its own. Links and what belongs to others are none."""
    if path.is_symlink():
        return False
    if whose(path) in (LOCK, HOLDER, GOING_ON):
        return path.is_file()
    return OWN.fullmatch(path.name) is not None and path.is_dir()


def sweep(directory: Path) -> None:
    """Remove what saves and removals that were cut off have left. For the one writer alone."""
    for path in filter(is_own, directory.glob(".*")):
        if CUT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)  # which follows no link
        elif path.name != whose(path):
            path.unlink(missing_ok=True)
