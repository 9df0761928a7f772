"""Arrays in a directory, by Orbax."""

from pathlib import Path
from typing import Any

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
        raise ImportError(
            'checkpoints need more packages: pip install "gradhpo[checkpoint]"'
        ) from error
    return orbax


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write them into a new directory; none may be empty. Not compressed: the size of a file is
    that of what it holds, and `read_arrays` may rely on it."""
    if not arrays:  # Orbax refuses a checkpoint of nothing
        return
    orbax = require_orbax()
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(path, arrays)


def read_arrays(path: Path, avals: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """The arrays of these names, shapes and dtypes.

    Nothing is allocated before what is declared has been compared with the files there are.

    Raises:
        CheckpointDamaged: the directory holds something else.
    """
    if not avals:
        return {}
    orbax = require_orbax()
    declared = sum(
        int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        for shape, dtype in avals.values()
    )
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if declared > there:
        raise CheckpointDamaged(f"declares {declared} bytes of arrays, but its files have {there}")
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(path).item_metadata.tree
        for name, aval in avals.items():
            seen = found.get(name)
            if seen is None or (tuple(seen.shape), np.dtype(seen.dtype).name) != aval:
                raise CheckpointDamaged(f"array {name} is not the one that the manifest declares")
        as_numpy = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in found}
        restored = checkpointer.restore(path, restore_args=as_numpy)
    return {name: restored[name] for name in avals}
