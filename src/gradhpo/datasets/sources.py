"""Where the files of a data set are: a folder of the user's, or the download cache.

The order is `data_dir`, the environment variable GRADHPO_DATA, the cache.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

from gradhpo.datasets.archives import DAMAGE, read_members
from gradhpo.datasets.dataset import DatasetError
from gradhpo.datasets.download import Remote, download, require, sha256
from gradhpo.utils.validation import GradhpoWarning

__all__ = ["Contents", "Source", "by_key", "find", "read"]

Wanted: TypeAlias = Callable[[PurePosixPath], bool]


class Source(NamedTuple):
    """The files a data set is read from, in the folder `root`."""

    root: Path
    paths: list[Path]
    remotes: Sequence[Remote]


class Contents(NamedTuple):
    """What was read: contents by path inside `root` or archive, digests by file."""

    entries: dict[PurePosixPath, bytes]
    files: dict[str, str]


def find(name: str, data_dir: str | os.PathLike[str] | None, remotes: Sequence[Remote]) -> Source:
    """Find the files of a set, downloading them if there is no other way.

    Args:
        name: The set; its folder is called this, with `_` or `-`.
        data_dir: Folder of folders. If given, nothing is downloaded.
        remotes: Official files.

    Raises:
        DatasetError: `data_dir` or GRADHPO_DATA is no folder; the set is not in
            `data_dir`; or the download is impossible, refused, or of the wrong
            digest.
    """
    given = "GRADHPO_DATA" if data_dir is None else "data_dir"
    folder = os.environ.get("GRADHPO_DATA") if data_dir is None else data_dir
    names = dict.fromkeys((name, name.replace("_", "-")))
    if folder:
        parent = Path(folder).expanduser()
        if not parent.is_dir():
            problem = "is not a folder" if parent.exists() else "does not exist"
            unset = "" if data_dir is not None else " Unset it to use the download cache."
            raise DatasetError(
                f"{given}={os.fspath(folder)!r} {problem}. It should be a folder that holds "
                f"{' or '.join(names)}/.{unset}"
            )
        for root in (parent / n for n in names):
            if root.is_dir():
                return Source(root, sorted(p for p in root.rglob("*") if p.is_file()), remotes)
    if data_dir is not None:
        raise DatasetError(
            f"No folder {' or '.join(names)} in data_dir={os.fspath(data_dir)!r}. It should hold "
            f"{_listing(remotes)}, or an archive or folder with their contents."
        )
    root = Path(require("pooch").os_cache("gradhpo")) / name
    return Source(root, [download(remote, root) for remote in remotes], remotes)


def _listing(remotes: Sequence[Remote]) -> str:
    return ", ".join(remote.file_name for remote in remotes)


def _listed_digests(root: Path) -> Mapping[Path, str]:
    """Digests in a SHA256SUMS file, as `sha256sum` writes it, in `root` or above it."""
    listed = {}
    for folder in (root.parent, root):
        sums = folder / "SHA256SUMS"
        # Names of files need not be UTF-8; a digest that is none fits nothing.
        text = sums.read_text("utf-8", "surrogateescape") if sums.is_file() else ""
        for line in text.splitlines():
            digest, _, name = line.partition(" ")
            listed[folder / name.lstrip(" *")] = digest.lower()
    return listed


def read(source: Source, wanted: Wanted) -> Contents:
    """Read the wanted files of a source, also those inside its archives.

    Args:
        source: From `find`.
        wanted: Says by path, without compression suffix, whether a file is read.

    Raises:
        DatasetError: nothing wanted was found; a file is damaged, unsafe or too
            large, or differs from the digest in a `SHA256SUMS` file in its
            folder or the one above, or, where that lists none, from the digest
            of the official file of its name and size; two different files claim
            the same path. The digests seen and expected are in the message.

    Warns:
        GradhpoWarning: a file has the name of an official one, but another size
            and digest, and is not in `SHA256SUMS`.
    """
    entries: dict[PurePosixPath, bytes] = {}
    files: dict[str, str] = {}
    listed = _listed_digests(source.root)
    for path in source.paths:
        if path.name.startswith(".") or path.name == "SHA256SUMS":
            continue
        digest = sha256(path)
        if listed.get(path, digest) != digest:
            raise DatasetError(f"{path} has SHA-256 {digest}, but SHA256SUMS lists {listed[path]}.")
        name = PurePosixPath(path.relative_to(source.root).as_posix())
        members = _members(path, name.parent, wanted, digest, source.remotes)
        if path not in listed:
            _compare(path, digest, source.remotes)
        for member, contents in members:
            files[str(name)] = digest
            if entries.setdefault(member, contents) != contents:
                raise DatasetError(f"Two different files in {source.root} claim to be {member}.")
    if not entries:
        raise DatasetError(
            f"{source.root} holds nothing of this data set. It should hold "
            f"{_listing(source.remotes)}, or an archive or folder with their contents."
        )
    return Contents(entries, files)


def _members(
    path: Path, parent: PurePosixPath, wanted: Wanted, digest: str, remotes: Sequence[Remote]
) -> list[tuple[PurePosixPath, bytes]]:
    try:
        members = read_members(path, lambda member: wanted(parent / member))
        return [(parent / member, contents) for member, contents in members]
    except (DatasetError, *DAMAGE) as error:
        official = {remote.file_name: remote.sha256 for remote in remotes}.get(path.name)
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise DatasetError(
            f"Cannot read {path}: {reason}. Its SHA-256 is {digest}; that "
            f"of the official file is {official or 'not known'}. Download it again."
        ) from error


def _compare(path: Path, digest: str, remotes: Sequence[Remote]) -> None:
    """Compare a file with the official one of its name, if there is one of known digest."""
    official = next((r for r in remotes if r.file_name == path.name and r.sha256), None)
    if official is None or digest == official.sha256:
        return
    seen = f"SHA-256 {digest}, the official file {official.sha256}"
    if path.stat().st_size == official.size:
        raise DatasetError(
            f"{path} has the name and the size of an official file, but not its contents: it has "
            f"{seen}. It is damaged: download it again from {official.url}. If it is meant to "
            "differ, list it in a file SHA256SUMS in its folder, as `sha256sum` writes it."
        )
    warnings.warn(
        f"{path} is not the official file of that name: it has {seen}. Numbers found on it are "
        "not those of the data set, unless it was only packed anew. If it is meant to differ, "
        "list it in a file SHA256SUMS in its folder, as `sha256sum` writes it.",
        GradhpoWarning,
        stacklevel=2,
    )


def by_key(
    paths: Iterable[PurePosixPath], key: Callable[[PurePosixPath], Hashable]
) -> dict[Hashable, PurePosixPath]:
    """Index paths by their key.

    Raises:
        DatasetError: two paths have the same key, such as an archive and its
            contents side by side; reading both would double the data.
    """
    index: dict[Hashable, PurePosixPath] = {}
    for path in paths:
        if index.setdefault(key(path), path) != path:
            raise DatasetError(f"{index[key(path)]} and {path} are the same file twice; keep one.")
    return index
