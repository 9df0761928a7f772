"""How well the weights of the examples tell the wrong labels from the right ones."""

from typing import NamedTuple

import numpy as np

__all__ = ["Detection", "detection"]


class Detection(NamedTuple):
    """How well small weights point at wrong labels; `f1` takes weights below 1/2 as wrong."""

    f1: float
    auc: float
    weight_clean: float
    weight_wrong: float


def detection(weights: np.ndarray, wrong: np.ndarray, below: float = 0.5) -> Detection:
    """Score weights (n,) as a detector of the wrong labels (n,), bool.

    Args:
        below: For `f1`, weights under this one are taken as wrong.

    >>> detection(np.array([0.9, 0.6, 0.4, 0.2]), np.array([False, False, False, True]))[:2]
    (0.6666666666666666, 1.0)
    """
    clean, bad = np.sort(weights[~wrong]), weights[wrong]
    flagged = weights < below
    f1 = 2 * np.sum(flagged & wrong) / max(np.sum(flagged) + np.sum(wrong), 1)
    # The part of the pairs in which the clean one weighs more; ties are half.
    under, upto = (np.searchsorted(clean, bad, side=side) for side in ("left", "right"))
    auc = 1 - np.mean(under + upto) / (2 * max(len(clean), 1))
    return Detection(*(float(x) for x in (f1, auc, clean.mean(), bad.mean())))
