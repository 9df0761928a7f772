"""What can be wrong with a checkpoint; every message names the file or the leaf, and the remedy."""

__all__ = ["CheckpointDamaged", "CheckpointError", "CheckpointMismatch", "DirectoryBusy"]


class CheckpointError(Exception):
    """A checkpoint cannot be written or read."""


class CheckpointDamaged(CheckpointError):
    """Files are missing, cut off or changed."""


class CheckpointMismatch(CheckpointError):
    """An intact checkpoint of something else: another run, other settings, another format."""


class DirectoryBusy(CheckpointError):
    """Another process writes there."""
