"""What a run that is over has to say of its updates."""

import numpy as np

from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status, status_message
from gradhpo.utils.validation import complain

__all__ = ["summarise"]

DOUBTFUL = 0.5
"""The share of updates taken with an inaccurate hypergradient above which a run says so."""


def summarise(name: str, before: BilevelState, after: BilevelState, spoilt: str = "") -> None:
    """One warning for all updates between two states that were rejected, or mostly inaccurate.

    Args:
        spoilt: What batch brought a value that is not finite; "" where none is known to have.

    Fits of HyperDistill that its guard refuses are no reason to warn: the theta before them is
    used, and many short runs have no other.

    Never an error, also if strict: the run is over, and its state would be lost.
    """
    counts = np.asarray(after.counts) - np.asarray(before.counts)
    found = {code: int(counts[code]) for code in Status if code and counts[code]}
    rejected = sum(n for code, n in found.items() if code.rejects)
    inaccurate = sum(found.values()) - rejected - found.get(Status.THETA_REJECTED, 0)
    updates = int(counts.sum())
    if not rejected and inaccurate <= DOUBTFUL * updates:
        return
    ranked = sorted(found, key=lambda code: -found[code])
    first = int(after.metadata["first_bad_step"])
    where = f"; the first ever at step {first}" if rejected else ""
    complain(
        f"{name}: {rejected} of the {updates} updates of this run were rejected{where}. Statuses "
        f"other than OK: {', '.join(f'{code.name} {found[code]}' for code in ranked)}. The most "
        f"frequent, {status_message(ranked[0])}." + (f" In the data, {spoilt}." if spoilt else ""),
        strict=False,
    )
