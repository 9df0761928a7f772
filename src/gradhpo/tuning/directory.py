"""The directory of a run: which files in it are ours."""

import re
from pathlib import Path

__all__ = ["OURS", "clear"]

OURS = (
    *("result.json", "curves.csv", "hyperparams.json", "optimizer.py", "report.html"),
    *("losses.png", "hyperparams.png", "hypergradient.png", "compare.png"),
)
LOG = re.compile(r"seed\d+\.(csv|jsonl)")


def clear(out: Path) -> None:
    """Remove what an earlier run of `tune` or `compare` has left, and nothing else."""
    logs = [path for path in out.glob("seed*") if LOG.fullmatch(path.name)]
    events = [
        path for path in out.glob("tensorboard/seed*/events.*") if path.parent.name[4:].isdecimal()
    ]
    for path in [*logs, *events, *(out / name for name in OURS)]:
        path.unlink(missing_ok=True)
