"""Arrays in a directory, by Orbax."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradhpo.checkpoint.errors import CheckpointDamaged

__all__ = ["read_arrays", "require_orbax", "write_arrays"]


def require_orbax() -> Any:
    """The package.

    Raises:
        ImportError: it is missing.
    """
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise ImportError('checkpoints need more packages: pip install ".[checkpoint]"') from error
    return orbax


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write them into a new directory; none may be empty. Not compressed: the size of a file is
    that of what it holds, and `read_arrays` may rely on it."""
    if not arrays:  # Orbax refuses a checkpoint of nothing
        return
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(path, arrays)


def _checkpointer() -> Any:
    """Of this process alone: others of the same program may be at other work."""
    orbax = require_orbax()
    alone = orbax.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = orbax.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return orbax.Checkpointer(handler, multiprocessing_options=alone)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every error that it raises, with its call stack, and one more on the way."""

    def others(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def read_arrays(path: Path, avals: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """The arrays of these names, shapes and dtypes.

    Nothing is allocated before what is declared has been compared with the files there are.

    Raises:
        CheckpointDamaged: the directory holds something else.
    """
    if not avals:
        return {}
    orbax = require_orbax()
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    declared = sum(_bytes(*aval) for aval in avals.values())
    if declared > there:
        raise CheckpointDamaged(f"declares {declared} bytes of arrays, but its files have {there}")
    with _quiet(), _checkpointer() as checkpointer:
        described = checkpointer.metadata(path).item_metadata
        if described is None:
            raise CheckpointDamaged("what says where its arrays are cannot be read")
        found = described.tree
        for name in sorted(found.keys() | avals.keys()):
            seen = found.get(name)
            if seen is None or (tuple(seen.shape), np.dtype(seen.dtype).name) != avals.get(name):
                raise CheckpointDamaged(f"array {name} is not the one that the manifest declares")
            if _bytes(seen.storage.chunk_shape, seen.dtype) > there:
                raise CheckpointDamaged(f"array {name} is cut into parts larger than its files")
        as_numpy = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in found}
        return checkpointer.restore(path, restore_args=as_numpy)


def _bytes(shape: Any, dtype: Any) -> int:
    return math.prod(map(int, shape)) * np.dtype(dtype).itemsize
