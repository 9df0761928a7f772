"""Downloads, each checked against a SHA-256 that was published for the file.

Without one the download is refused, and the message says where to put the file
by hand. Pooch writes to a temporary name and renames once the digest is right,
so that an interrupted download is never used.
"""

import hashlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from gradhpo.datasets.dataset import DatasetError

__all__ = ["Remote", "download", "require", "sha256"]


class Remote(NamedTuple):
    """An official file: its URL, SHA-256 and size in bytes (None: not known for certain)."""

    url: str
    sha256: str | None
    size: int | None = None

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def require(module: str) -> ModuleType:
    """Import an optional library.

    Raises:
        ImportError: it is not installed; the message has the line to run.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This data set needs {module.split('.')[0]}. In a checkout of gradhpo run:\n"
            '    pip install ".[data]"'
        ) from error


def download(remote: Remote, folder: Path) -> Path:
    """Return the path of an official file in `folder`, downloading it if need be.

    Raises:
        DatasetError: no digest is known; the cached file has another one (it is
            set aside); the network or the digest of the download fails.
    """
    target = folder / remote.file_name
    if remote.sha256 is None:
        raise DatasetError(
            f"{remote.url} is not downloaded, because no SHA-256 to check it against is known. "
            f"Download it yourself and put it in <data_dir>/{folder.name}/, where data_dir is an "
            "argument or the environment variable GRADHPO_DATA."
        )
    if target.exists():
        digest = sha256(target)
        if digest == remote.sha256:
            return target
        aside = target.replace(target.with_name(target.name + ".corrupt"))
        raise DatasetError(
            f"{target} has SHA-256 {digest}, but {remote.sha256} was expected. It was moved to "
            f"{aside.name}; load again to download a fresh copy."
        )
    try:
        require("pooch").retrieve(
            remote.url, known_hash=f"sha256:{remote.sha256}", path=folder, fname=target.name
        )
    except (OSError, ValueError) as error:  # OSError: the network; ValueError: the digest
        raise DatasetError(
            f"Could not download {remote.url} (SHA-256 {remote.sha256}) to {target}: {error} "
            "Without a network, put the file there by hand, or in a folder of your own, given as "
            "data_dir or GRADHPO_DATA. A wrong digest usually means a short file or an HTML page."
        ) from error
    return target


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
