"""Saving states: the one that writes to a directory."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradhpo.checkpoint import directory as folder
from gradhpo.checkpoint.arrays import require_orbax, write_arrays
from gradhpo.checkpoint.environment import environment
from gradhpo.checkpoint.errors import CheckpointError
from gradhpo.checkpoint.leaves import encoded, held, packed
from gradhpo.checkpoint.lock import only_writer
from gradhpo.checkpoint.manifest import FILE, Manifest, as_json
from gradhpo.checkpoint.reader import ARRAYS, Found, array_name, intact, newest, one_line
from gradhpo.core.state import BilevelState
from gradhpo.utils.settings import check_count
from gradhpo.utils.validation import complain

__all__ = ["Writer", "save", "writing"]


class Writer:
    """The one that writes to a directory, see `writing`.

    Attributes:
        directory: Absolute.
    """

    def __init__(self, directory: Path, keep: int | None, pool: ThreadPoolExecutor):
        self.directory, self._keep, self._pool = directory, keep, pool
        self._pending: Future[None] | None = None

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
            state: A `BilevelState`, or any tree of arrays. It must not be donated before `wait`;
                arrays of NumPy are copied.
            step: Its number, larger than those there are; None: `state.step`. The very state that
                is there already is not written again.
            about: Facts that a run which goes on must share: settings, digests of data. JSON.
            position: Where sources of data stand. JSON.

        Raises:
            TypeError, ValueError: the state, or what is said of it, cannot be saved.
            CheckpointError: the save before this one has failed. This one is on.
        """
        step = _number(state, step)
        state = held(state)
        facts = as_json(about or {}, "about"), as_json(position or {}, "position")
        here = environment()  # of this thread: `with jax.enable_x64(True)` is of one alone
        try:
            self.wait()
        finally:
            self._pending = self._pool.submit(self._write, state, step, *facts, here)

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
        return newest(self.directory, set_aside=True)

    def _write(self, state: Any, step: int | None, about: dict, position: dict, here: dict) -> None:
        number = "?"
        try:
            number = int(state.step) if step is None else step  # may wait for the computation
            leaves = encoded(state)
            there = folder.numbers(self.directory)
            if there and number <= there[-1]:
                _check_same(folder.path_of(self.directory, there[-1]), number, leaves)
                return
            metrics = list(state.metadata) if isinstance(state, BilevelState) else []
            kinds = [leaf for leaf, _ in leaves]
            manifest = Manifest(number, about, position, metrics, here, kinds)
            arrays = [array for _, array in leaves]
            folder.publish(self.directory, number, lambda path: _write(path, manifest, arrays))
        except Exception as error:
            raise CheckpointError(
                f"cannot save step {number} in {self.directory}: {one_line(error)}. Earlier "
                "checkpoints are as they were."
            ) from error
        if self._keep is not None:
            self._remove(there[: max(0, len(there) + 1 - self._keep)])

    def _remove(self, numbers: list[int]) -> None:
        """Those of no more use; what cannot be removed now is tried again at the next save."""
        for number in numbers:
            try:
                folder.remove(self.directory, number)
            except OSError as error:
                path = folder.path_of(self.directory, number)
                complain(f"{path} cannot be removed: {one_line(error)}.", strict=False)


def _number(state: Any, step: int | None) -> int | None:
    """Under which a state is saved; None: as it says when it has been computed."""
    if step is not None:
        return check_count("step", step, minimum=0)
    if not isinstance(state, BilevelState):
        raise TypeError(f"a {type(state).__name__} does not know its step: give step=.")
    return None


def _check_same(newest: Path, step: int, leaves: list) -> None:
    """A state that need not be written, since it is the newest one.

    Raises:
        CheckpointError: it is another one.
    """
    found = intact(newest).manifest
    if (found.step, found.leaves) != (step, [leaf for leaf, _ in leaves]):
        raise CheckpointError(
            f"{newest.name} is there, of another state, and numbers have to grow: go on from it, "
            "or take another directory"
        )


def _write(path: Path, manifest: Manifest, arrays: list[np.ndarray]) -> None:
    write_arrays(path / ARRAYS, {array_name(i): packed(x) for i, x in enumerate(arrays) if x.size})
    (path / FILE).write_text(manifest.to_json(), encoding="utf-8", newline="")


@contextmanager
def writing(
    directory: str | os.PathLike, *, keep: int | None = 2, takeover: bool = False
) -> Iterator[Writer]:
    """Be the one that saves states in a directory.

    A checkpoint is complete or absent, whatever is cut off; its files carry digests; and a damaged
    one is passed over for the one before it, with a warning.

    Args:
        directory: Created when missing.
        keep: How many checkpoints stay after each save, whoever has made them; None: all.
        takeover: Whether the holder of the directory, on another machine, is known to have ended.
            On this machine that is found out.

    Returns:
        A context manager; leaving it waits for the last save.

    Raises:
        DirectoryBusy: another process writes there.
        OSError: the directory cannot be written to.
        CheckpointError: the last save has failed.
        ValueError: the path is none for Orbax; or this is not the first process of its program.
        ImportError: Orbax or filelock is missing.

    >>> import tempfile, jax.numpy as jnp
    >>> with writing(tempfile.mkdtemp()) as writer:
    ...     writer.save({"w": jnp.arange(3.0)}, step=1)
    ...     writer.wait()
    ...     print(writer.newest().restore({"w": jnp.zeros(3)}))
    {'w': Array([0., 1., 2.], dtype=float32)}
    """
    require_orbax()
    if jax.process_index() != 0:
        raise ValueError(
            f"process {jax.process_index()} of {jax.process_count()} cannot write checkpoints: "
            "Orbax writes arrays of the host from process 0 alone. Save there."
        )
    keep = None if keep is None else check_count("keep", keep)
    path = folder.prepare(directory)
    with only_writer(path, takeover), ThreadPoolExecutor(1, "gradhpo-checkpoint") as pool:
        folder.sweep(path)
        writer = Writer(path, keep, pool)
        try:
            yield writer
        except BaseException as error:
            try:
                writer.wait()
            except CheckpointError as failure:  # the first error is what the user has to see
                error.add_note(f"gradhpo: {failure}")
            raise
        writer.wait()


def save(
    directory: str | os.PathLike,
    state: Any,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Save one state and wait for it; what is there already stays. See `writing`, which loops use.

    Returns:
        The path of the checkpoint.

    Raises:
        FileExistsError: there is one of this step.
    """
    number = _number(state, step)
    number = int(state.step) if number is None else number
    with writing(directory, keep=None) as writer:
        path = folder.path_of(writer.directory, number)
        if path.exists():
            raise FileExistsError(f"{path} is there already: a checkpoint is never replaced.")
        writer.save(state, step=number, about=about)
    return path
