"""Means over seeds with Student t intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Summary", "interval", "paired"]


@dataclass(frozen=True, eq=False)
class Summary:
    """Values over seeds, their mean and its 95 % interval; all arrays are float64.

    Attributes:
        mean: shape `()`, or `(epochs,)` for a curve.
        ci95: shape `(2,)`, or `(2, epochs)`: lower and upper end; NaN where unknown.
        seeds: shape `(seeds,)`, or `(seeds, epochs)`: the values themselves.

    >>> interval([1.0, 2.0, 3.0]).to_json()["mean"]
    2.0
    """

    mean: np.ndarray
    ci95: np.ndarray
    seeds: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """The three arrays as numbers and lists; NaN and infinity become None."""
        fields = {"mean": self.mean, "ci95": self.ci95, "seeds": self.seeds}
        return {name: _to_lists(array) for name, array in fields.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Summary":
        """The inverse of `to_json`, up to None becoming NaN.

        Raises:
            ValueError: a field is missing, unknown, not numeric or of the wrong shape.
        """
        if set(data) != {"mean", "ci95", "seeds"}:
            raise ValueError(f"keys must be mean, ci95 and seeds, not {', '.join(data)}")
        mean, ci95, seeds = (_to_array(data[name]) for name in ("mean", "ci95", "seeds"))
        if seeds.ndim not in (1, 2) or not seeds.size:
            raise ValueError(f"seeds has shape {seeds.shape}")
        if mean.shape != seeds.shape[1:] or ci95.shape != (2, *mean.shape):
            raise ValueError(f"mean {mean.shape}, ci95 {ci95.shape} and seeds {seeds.shape} differ")
        return cls(mean, ci95, seeds)


def interval(values: ArrayLike) -> Summary:
    """The mean over seeds and its 95 % Student t interval.

    Every seed counts: one value that is not finite makes mean and interval NaN (or infinite)
    rather than disappear. One seed has no interval: both ends are NaN.

    Args:
        values: shape `(seeds,)`, or `(seeds, epochs)` for curves.

    Raises:
        ValueError: another shape, or nothing in it.

    >>> interval([1.0, 2.0, 3.0]).ci95.round(3).tolist()
    [-0.484, 4.484]
    >>> interval([0.5]).to_json()
    {'mean': 0.5, 'ci95': [None, None], 'seeds': [0.5]}
    """
    seeds = np.asarray(values, dtype=np.float64)
    if seeds.ndim not in (1, 2) or not seeds.size:
        raise ValueError(
            f"values must have shape (seeds,) or (seeds, epochs) and not be empty, but have "
            f"shape {seeds.shape}."
        )
    count = len(seeds)
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged seed is a result
        mean = np.asarray(seeds.mean(axis=0))
        if count == 1:
            return Summary(mean, np.full((2, *mean.shape), np.nan), seeds)
        from scipy.stats import t  # a second to import, so only where it is used

        half = t.ppf(0.975, count - 1) * seeds.std(axis=0, ddof=1) / np.sqrt(count)
        return Summary(mean, np.stack([mean - half, mean + half]), seeds)


def paired(values: ArrayLike, baseline_values: ArrayLike) -> Summary:
    """`interval` of `values - baseline_values`, seed by seed.

    Sharper than two separate intervals when both runs share what a seed decides: the data,
    the batches, the initial weights.

    Raises:
        ValueError: the two have different shapes.

    >>> paired([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]).ci95.round(3).tolist()
    [0.1, 0.1]
    """
    left, right = np.asarray(values, np.float64), np.asarray(baseline_values, np.float64)
    if left.shape != right.shape:
        raise ValueError(
            f"paired values must come from the same seeds, but have shapes {left.shape} and "
            f"{right.shape}."
        )
    with np.errstate(invalid="ignore", over="ignore"):
        return interval(left - right)


def _to_lists(array: np.ndarray) -> Any:
    entries = array.astype(object)
    entries[~np.isfinite(array)] = None
    return entries.tolist()


def _to_array(data: Any) -> np.ndarray:
    entries = np.asarray(data, dtype=object)
    if not all(
        entry is None or (isinstance(entry, int | float) and not isinstance(entry, bool))
        for entry in entries.flat
    ):
        raise ValueError("an entry is neither a number nor null")
    return entries.astype(np.float64)  # None becomes NaN
