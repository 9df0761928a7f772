"""Saving and restoring states: the one that writes to a directory, and functions for a look."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.checkpoint import directory as folder
from gradhpo.checkpoint.arrays import read_arrays, require_orbax, write_arrays
from gradhpo.checkpoint.environment import PACKAGES, differences, environment
from gradhpo.checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from gradhpo.checkpoint.leaves import check_matches, decoded, digest, encoded, packed, unpacked
from gradhpo.checkpoint.lock import only_writer
from gradhpo.checkpoint.manifest import FILE, Manifest, as_json, read_manifest
from gradhpo.core.state import BilevelState
from gradhpo.utils.validation import check_count, complain

__all__ = ["Found", "Writer", "load", "restore", "save", "steps", "writing"]

ARRAYS = "arrays"


class Found(NamedTuple):
    """An intact checkpoint."""

    path: Path
    manifest: Manifest

    def restore(self, template: Any) -> Any:
        """Its content, in a tree like the template.

        Raises:
            CheckpointMismatch: the template has other leaves; names the first.
            CheckpointDamaged: the arrays are not those that were saved.
        """
        if isinstance(template, BilevelState):
            template = self._with_metrics(template)
        leaves = self.manifest.leaves
        check_matches(str(self.path), template, leaves)
        return decoded(template, leaves, self.arrays())

    def arrays(self) -> list[np.ndarray]:
        """Its leaves, in order.

        Raises:
            CheckpointDamaged: they are not those that were saved.
        """
        leaves = self.manifest.leaves
        avals = {_name(i): (leaf.shape, _stored(leaf)) for i, leaf in _filled(leaves)}
        try:
            found = read_arrays(self.path / ARRAYS, avals)
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{self.path} is damaged: {error}.") from None
        except Exception as error:  # of any kind, from below Orbax
            raise CheckpointDamaged(f"{self.path} cannot be read: {_line(error)}.") from error
        arrays = []
        for i, leaf in enumerate(leaves):
            array = found.get(_name(i), np.empty(leaf.shape, _stored(leaf)))
            if digest(array) != leaf.sha256:
                raise CheckpointDamaged(
                    f"{self.path} is damaged: leaf {leaf.path} differs from its digest."
                )
            arrays.append(unpacked(array, leaf))
        return arrays

    def _with_metrics(self, state: BilevelState) -> BilevelState:
        """A template with the metrics of the saved state: `run` has made room for what the losses
        return beside their values, and `init` does not know of them."""
        first = ".metadata"
        kinds = {leaf.path: leaf for leaf in self.manifest.leaves if leaf.path.startswith(first)}
        metadata: dict[str, Any] = dict(state.metadata)
        for name in self.manifest.metrics:
            leaf = kinds.get(f"{first}[{name!r}]")
            if leaf is not None and name not in metadata:
                metadata[name] = np.zeros(leaf.shape, leaf.dtype)
        return state.update(metadata=metadata)


class Writer:
    """The one that writes to a directory, see `writing`.

    Attributes:
        directory: Absolute.
    """

    def __init__(self, directory: Path, keep: int, pool: ThreadPoolExecutor):
        self.directory, self._keep, self._pool = directory, keep, pool
        self._pending: Future[Path] | None = None

    def save(
        self,
        state: Any,
        *,
        step: int | None = None,
        about: Mapping[str, Any] | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to save a state; it is written while the caller goes on, after the one before.

        Args:
            state: A `BilevelState`, or any tree of arrays. It must not be donated before `wait`.
            step: Its number; None: `state.step`. A number that there is already is left alone.
            about: Facts that a run which goes on must share: settings, digests of data. JSON.
            position: Where sources of data stand. JSON.

        Raises:
            CheckpointError: the save before this one has failed.
        """
        self.wait()
        number = int(state.step) if step is None else check_count("step", step, minimum=0)
        facts = as_json(about or {}), as_json(position or {})
        self._pending = self._pool.submit(self._write, state, number, *facts)

    @property
    def busy(self) -> bool:
        """Whether a save is still on."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            CheckpointError: it is not, and why. Earlier checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Found | None:
        """The newest intact checkpoint; None where there is none at all. Damaged ones are renamed.

        Raises:
            CheckpointDamaged: there are checkpoints, and none is intact.

        Warns:
            GradhpoWarning: of every damaged one.
        """
        return _newest(self.directory, set_aside=True)

    def _write(self, state: Any, step: int, about: dict, position: dict) -> Path:
        try:
            if step in folder.numbers(self.directory):
                return folder.path_of(self.directory, step)
            path = folder.publish(
                self.directory, step, lambda path: _write(path, state, step, about, position)
            )
            older = [number for number in folder.numbers(self.directory) if number < step]
            for number in older[: len(older) + 1 - self._keep]:
                folder.remove(self.directory, number)
            return path
        except Exception as error:
            raise CheckpointError(
                f"cannot save step {step} in {self.directory}: {_line(error)}. Earlier checkpoints "
                "are as they were."
            ) from error


def _write(path: Path, state: Any, step: int, about: dict, position: dict) -> None:
    jax.block_until_ready(state)
    leaves = encoded(state)
    arrays = {_name(i): packed(array) for i, (_, array) in enumerate(leaves) if array.size}
    write_arrays(path / ARRAYS, arrays)
    metrics = list(state.metadata) if isinstance(state, BilevelState) else []
    manifest = Manifest(step, about, position, metrics, environment(), [leaf for leaf, _ in leaves])
    (path / FILE).write_text(manifest.to_json(), encoding="utf-8", newline="")


def _name(i: int) -> str:
    """Of a leaf in Orbax: a number, so that no name of a user's becomes a path."""
    return f"{i:06d}"


def _filled(leaves: list) -> list[tuple[int, Any]]:
    return [(i, leaf) for i, leaf in enumerate(leaves) if leaf.bytes]


def _stored(leaf: Any) -> str:
    return packed(np.empty(0, jax.numpy.dtype(leaf.dtype))).dtype.name


def _line(error: BaseException) -> str:
    """An error on a line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _newest(directory: Path, *, set_aside: bool) -> Found | None:
    damaged = []
    for step in reversed(folder.numbers(directory)):
        path = folder.path_of(directory, step)
        try:
            return _intact(path)
        except CheckpointDamaged as error:
            damaged.append(str(error))
            moved = ""
            if set_aside:
                try:
                    moved = f" It is now {folder.set_aside(directory, step).name}."
                except OSError as refused:
                    moved = f" It cannot be renamed: {refused.strerror}."
            complain(f"checkpoint {error}{moved} The one before it is taken.", strict=False)
    if not damaged:
        return None
    raise CheckpointDamaged(
        f"no checkpoint in {directory} is intact: {'; '.join(damaged)}. Restore one from a backup, "
        "or begin anew in another directory."
    )


def _intact(path: Path) -> Found:
    try:
        folder.verify(path)
        return Found(path, read_manifest(path))
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"{path.name}: {error}") from None


@contextmanager
def writing(
    directory: str | os.PathLike, *, keep: int = 2, takeover: bool = False
) -> Iterator[Writer]:
    """Be the one that saves states in a directory.

    A checkpoint is complete or absent, whatever is cut off; its files carry digests; and a damaged
    one is passed over for the one before it, with a warning.

    Args:
        directory: Created when missing.
        keep: How many checkpoints stay.
        takeover: Whether the holder of the directory, on another machine, is known to have ended.
            On this machine that is found out.

    Returns:
        A context manager; leaving it waits for the last save.

    Raises:
        DirectoryBusy: another process writes there.
        OSError: the directory cannot be written to.
        CheckpointError: the last save has failed.
        ImportError: Orbax or filelock is missing.

    >>> import tempfile, jax.numpy as jnp
    >>> with writing(tempfile.mkdtemp()) as writer:
    ...     writer.save({"w": jnp.arange(3.0)}, step=1)
    ...     writer.wait()
    ...     print(writer.newest().restore({"w": jnp.zeros(3)}))
    {'w': Array([0., 1., 2.], dtype=float32)}
    """
    require_orbax()
    keep, path = check_count("keep", keep), folder.prepare(directory)
    with only_writer(path, takeover), ThreadPoolExecutor(1, "gradhpo-checkpoint") as pool:
        folder.sweep(path)
        writer = Writer(path, keep, pool)
        yield writer
        writer.wait()


def save(
    directory: str | os.PathLike,
    state: Any,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save one state and wait for it; see `writing`, which loops use.

    Returns:
        The path of the checkpoint.

    Raises:
        FileExistsError: there is one of this step.
    """
    number = int(state.step) if step is None else check_count("step", step, minimum=0)
    with writing(directory, keep=keep) as writer:
        path = folder.path_of(writer.directory, number)
        if path.exists():
            raise FileExistsError(f"{path} is there already: a checkpoint is never replaced.")
        writer.save(state, step=number, about=about)
    return path


def restore(
    directory: str | os.PathLike,
    template: Any,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Any:
    """A saved state, the newest that is intact; nothing is changed in the directory.

    Args:
        template: A state (or tree) of the same structure, shapes and dtypes, as `init` makes it.
        step: Which checkpoint; None: the newest.
        about: What the checkpoint has to be of; None: that is not looked at.

    Raises:
        FileNotFoundError: there is no checkpoint (of this step).
        CheckpointDamaged: none is intact.
        CheckpointMismatch: it is of something else; the message names the first difference.

    Warns:
        GradhpoWarning: newer ones are damaged, or the environment is another one.
    """
    found = _found(Path(directory).absolute(), step)
    if about is not None:
        check_about(found, as_json(about))
    compare_environments(found)
    return found.restore(template)


def load(
    directory: str | os.PathLike, *, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The leaves of a checkpoint by their paths, and what it is about, without a template.

    Raises:
        FileNotFoundError, CheckpointDamaged, CheckpointMismatch: as `restore`.
    """
    found = _found(Path(directory).absolute(), step)
    paths = [leaf.path for leaf in found.manifest.leaves]
    return dict(zip(paths, found.arrays(), strict=True)), found.manifest.about


def steps(directory: str | os.PathLike) -> list[int]:
    """The numbers of the checkpoints there are, in order; whether they are intact is not looked at.

    >>> steps("no such directory")
    []
    """
    return folder.numbers(Path(directory).absolute())


def _found(directory: Path, step: int | None) -> Found:
    if step is None:
        found = _newest(directory, set_aside=False)
    else:
        path = folder.path_of(directory, check_count("step", step, minimum=0))
        found = _intact(path) if path.is_dir() and not path.is_symlink() else None
    if found is None:
        there = folder.numbers(directory)
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        steps = f" (steps there are: {', '.join(map(str, there))})" if there else ""
        raise FileNotFoundError(f"there is no {which} in {directory}{steps}.")
    return found


def check_about(found: Found, about: dict[str, Any]) -> None:
    """A checkpoint of this very run.

    Programs are compared within one version of JAX and of the packages that trace them.

    Raises:
        CheckpointMismatch: lists all that differs, old -> new.
    """
    before, now = found.manifest.environment, environment()
    if any(before.get(name) != now[name] for name in ("python", *PACKAGES)):
        about = about | {"programs": found.manifest.about.get("programs")}
    differing = differences(found.manifest.about, about)
    if differing:
        raise CheckpointMismatch(
            f"{found.path} is of another run: {'; '.join(differing)}. Go on with what it was made "
            "with, or begin anew in another directory."
        )


def compare_environments(found: Found) -> None:
    """Refuse another float width, tell of other differences.

    Raises:
        CheckpointMismatch: 64-bit floats are on here and were off there, or the reverse.

    Warns:
        GradhpoWarning: other versions, devices or settings.
    """
    before, now = found.manifest.environment, environment()
    name = "jax_enable_x64"
    if before.get(name) != now[name]:
        raise CheckpointMismatch(
            f"{found.path} was saved with {name}={before.get(name)}, and now it is {now[name]}: "
            f"set it as it was (jax.config.update('{name}', ...))."
        )
    differing = differences(before, now)
    if differing:
        complain(
            f"{found.path} was saved in another environment: {'; '.join(differing)}. The run goes "
            "on, but its bits may differ from those of an uninterrupted one.",
            strict=False,
        )
