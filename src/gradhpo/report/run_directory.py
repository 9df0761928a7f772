"""The directory of a run: tried out, free of other results, and one command at a time in it."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradhpo.checkpoint.lock import only_writer
from gradhpo.report.run_record import RUN, Run, read, resumed
from gradhpo.utils._files import not_a_link

__all__ = ["held", "output_directory"]

RESULTS = (
    ".csv",
    ".html",
    ".json",
    ".jsonl",
    ".png",
)  # kinds of files; their names are known when a study has run
ROOM = 16 << 20  # bytes; few runs write more


def output_directory(path: str | Path, overwrite: bool = False) -> Path:
    """Create the directory a study writes to, try it out, and return it as an absolute path.

    Called before the work starts, so that a long run does not end in an error that was
    there from the beginning.

    Args:
        path: The directory. It may hold other files, but none of the kinds that studies write
            (.json, .jsonl, .csv, .png, .html).
        overwrite: Whether it may hold those too; they are replaced where the names agree.

    Raises:
        NotADirectoryError: `path`, or one of its parents, is a file.
        FileExistsError: it holds results, or a run that was cut off.
        OSError: the directory cannot be created or written to, or the disk is full.

    >>> import tempfile
    >>> output_directory(tempfile.mkdtemp() + "/a/b").name
    'b'
    """
    out = _tried(path)
    if not overwrite:
        _check_free(out)
    return out


def _check_free(out: Path, names: Sequence[str] = ()) -> None:
    run = read(out)
    if run is not None and not run.finished:
        raise FileExistsError(
            f"{out} holds a run of {run.command} that was cut off. Go on by --resume, choose "
            "another directory with --out, or begin anew with --overwrite."
        )
    there = [
        file
        for file in out.iterdir()
        if file.name in names or (file.suffix in RESULTS and not file.name.startswith("."))
    ]
    if results := sorted(file.name for file in there):
        more = ", ..." if len(results) > 3 else ""
        raise FileExistsError(
            f"{out} holds results already ({', '.join(results[:3])}{more}). Choose another "
            "directory with --out, or replace them with --overwrite."
        )


@contextmanager
def held(
    out: Path,
    run: Run,
    folder: str,
    used: Callable[[], object],
    *,
    overwrite: bool,
    resume: bool,
    names: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """Be the one command that works in a directory.

    Args:
        out: Absolute.
        run: What is asked for.
        folder: Where the command keeps a run that is not finished.
        used: Whether it keeps anything there.
        overwrite, resume: Whether it may hold another run, which is still there at the beginning;
            or goes on with this one.
        names: Other files that are going to be written, which it may not hold either.
        defaults: See `resumed`.

    Yields:
        The run, with `resume` as it is there. If it is finished, nothing is held or created.

    Raises:
        FileExistsError: it holds results, or a run that was cut off, and nothing is said of them.
        FileNotFoundError: there is no run to go on with.
        ValueError: there is, but it is another one; names what differs.
        DirectoryBusy: another process is at work there; names it.
        OSError: the directory cannot be written to, or its folder is a link or a file.
    """
    found = resumed(out, run, defaults) if resume else run
    if found.finished:
        yield found
        return
    _tried(out)
    own = not_a_link(out / folder)
    if own.exists() and not own.is_dir():
        raise NotADirectoryError(f"{own} is a file: remove it, or choose another with --out.")
    with only_writer(out):
        if resume:  # another command may have been at work since
            found = resumed(out, run, defaults)
        elif not overwrite:
            _check_free(out, names)
            if used():
                raise FileExistsError(
                    f"{own} holds what is left of a run whose {RUN} is missing. Choose another "
                    "directory with --out, or begin anew with --overwrite."
                )
        yield found


def _tried(path: str | Path) -> Path:
    absolute = Path(path).absolute()
    try:
        absolute.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure test: permission bits say nothing to root or on a network disk.
        with tempfile.TemporaryFile(dir=absolute) as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except (FileExistsError, NotADirectoryError):
        message = f"the output path {absolute} is, or lies below, a file; choose a directory."
        raise NotADirectoryError(message) from None
    except OSError as error:
        raise type(error)(
            f"cannot write to {absolute}: {error.strerror}. Choose another directory with --out, "
            f"with {ROOM >> 20} MB to spare."
        ) from None
    return absolute
