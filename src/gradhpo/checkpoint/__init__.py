"""States on disk: whole or absent, with digests, one writer, restored strictly.

    state = optimizer.run(state, M=100, checkpoint="runs/a", ...)   # again: goes on where it was

    with checkpoint.writing("runs/b") as writer:                    # a loop of one's own
        found = writer.newest()
        state = state if found is None else found.restore(state)
        for ...:
            state = optimizer.step(state, ...)
            writer.save(state)                                      # in the background

A checkpoint is a directory `step-0000000020`, written by Orbax under another name and renamed when
it is on the disk, with `manifest.json` (every leaf's path, type and SHA-256, the settings of the
run, where its data stand, the environment) and `SHA256SUMS` of all files. See docs/checkpoints.md.
"""

from gradhpo.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    DirectoryBusy,
)
from gradhpo.checkpoint.reader import Found, load, restore, steps
from gradhpo.checkpoint.settings import Checkpoints
from gradhpo.checkpoint.writer import Writer, save, writing

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointMismatch",
    "Checkpoints",
    "DirectoryBusy",
    "Found",
    "Writer",
    "load",
    "restore",
    "save",
    "steps",
    "writing",
]
