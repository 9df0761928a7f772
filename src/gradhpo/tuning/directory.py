"""The directory of a run: which files in it are ours. Links in it are never followed."""

import re
from pathlib import Path

__all__ = ["OURS", "clear", "events"]

OURS = (
    *("result.json", "curves.csv", "hyperparams.json", "optimizer.py", "report.html"),
    *("losses.png", "hyperparams.png", "hypergradient.png", "compare.png"),
)
LOG = re.compile(r"seed\d+\.(csv|jsonl)")


def clear(out: Path) -> None:
    """Remove what an earlier run of `tune` or `compare` has left, and nothing else."""
    logs = [path for path in out.glob("seed*") if LOG.fullmatch(path.name)]
    written = [
        path
        for path in out.glob("tensorboard/seed*/events.*")
        if path.parent.name[4:].isdecimal() and not _leads_elsewhere(path.parent)
    ]
    for path in [*logs, *written, *(out / name for name in OURS)]:
        path.unlink(missing_ok=True)


def events(out: Path, seed: int) -> Path:
    """Where TensorBoard's events of a seed go.

    Raises:
        NotADirectoryError: that leads out of the directory of the run.
    """
    place = out / "tensorboard" / f"seed{seed}"
    if _leads_elsewhere(place):
        raise NotADirectoryError(
            f"{place} is a link, or lies below one, and would lead elsewhere: remove it."
        )
    return place


def _leads_elsewhere(place: Path) -> bool:
    return place.is_symlink() or place.parent.is_symlink()
