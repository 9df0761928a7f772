"""What was found, and when a method is as low as random search is in the end."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradhpo.report import write_csv
from gradhpo.report.results import MethodResult
from gradhpo.tuning.searches import SEARCHES

__all__ = [
    "Cell",
    "Cells",
    "Middle",
    "all_reached",
    "findings",
    "middle",
    "reached",
    "write_reached",
    "write_table",
]

MANY = 100  # hyperparameters from which gradients are to need
SHARE = 0.1  # of the gradients at most


class Cell(NamedTuple):
    """A method at a number of hyperparameters."""

    method: MethodResult
    seconds: float  # of one seed

    def __str__(self) -> str:
        val, test = (self.method.metrics[f"{side}_loss"].mean for side in ("val", "test"))
        return f"validation loss {val:.4f}, test {test:.4f}, {self.seconds:.1f} s a seed"


Cells = Mapping[tuple[int, str], Cell]
"""By number of hyperparameters and name of the method."""


class Middle(NamedTuple):
    """A median and its interval; infinite where it was not reached."""

    median: float
    low: float
    high: float


def reached(curve: np.ndarray, levels: np.ndarray, budget: float) -> np.ndarray:
    """Gradients after which each seed is at or below its level; infinite: never.

    Args:
        curve: The lowest loss so far, (seeds, parts), at the ends of equal parts of the budget;
            what is returned is rounded up to these. NaN before there is one.
        levels: (seeds,).

    >>> reached(np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), np.array([2.0, 2.0]), 300)
    array([200.,  inf])
    """
    there = curve <= levels[:, None]
    parts = np.where(there.any(1), there.argmax(1) + 1.0, np.inf)
    return parts * (budget / curve.shape[1])


def middle(values: np.ndarray) -> Middle:
    """The median and an interval that holds the true one in 95 % of cases or more, whatever the
    distribution: between the k-th values from both ends, with the largest such k (all values, below
    six seeds, hold it less often).

    >>> middle(np.array([3.0, 1.0, 2.0, np.inf, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]))
    Middle(median=5.5, low=2.0, high=9.0)
    """
    from scipy.stats import binom

    ordered = np.sort(values)
    k = max(1, int(binom.ppf(0.025, len(ordered), 0.5)))
    centre = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]]
    return Middle(float(centre.mean()), float(ordered[k - 1]), float(ordered[-k]))


def all_reached(cells: Cells, budget: float) -> Iterator[tuple[int, str, np.ndarray]]:
    """Size, method, gradients (seeds,), where there is random search to compare with."""
    for (size, name), cell in cells.items():
        if (size, "random") in cells:
            levels = cells[size, "random"].method.metrics["val_loss"].seeds
            curve = cell.method.metrics["val_loss_by_epoch"].seeds
            yield size, name, reached(curve, levels, budget)


def findings(cells: Cells, budget: float) -> list[str]:
    """The lowest method at each size, and from 100 on whether each method that follows gradients
    needs a tenth of random search's."""
    lines = []
    for size in dict.fromkeys(size for size, _ in cells):
        means = {
            name: cell.method.metrics["val_loss"].mean
            for (n, name), cell in cells.items()
            if n == size
        }
        best = min(means, key=lambda name: np.nan_to_num(means[name], nan=np.inf))
        lines.append(f"H = {size:,}: the lowest is {best}, {means[best]:.4f}")
    for size, name, took in all_reached(cells, budget):
        if name != "random" and name not in SEARCHES and size >= MANY:
            share = middle(took).median / budget
            said = "yes" if share <= SHARE else "no"
            number = f"{100 * share:.3g} %" if np.isfinite(share) else "never"
            lines.append(
                f"H = {size:,}, {name}: as low as random search's end after a tenth of its "
                f"gradients: {said} ({number}, median)"
            )
    return lines


def write_reached(cells: Cells, budget: float, path: Path) -> None:
    """A row for every seed; `inf`: not within the budget."""
    rows = [
        [size, name, seed, gradients]
        for size, name, took in all_reached(cells, budget)
        for seed, gradients in enumerate(took)
    ]
    write_csv(path, ["hyperparameters", "method", "seed", "gradients"], rows)


def write_table(cells: Cells, budget: float, path: Path) -> None:
    """A row for every method and size: losses, gradients until random search's end, seconds."""
    took = {(size, name): values for size, name, values in all_reached(cells, budget)}
    rows = []
    for (size, name), cell in cells.items():
        row: list[object] = [size, name]
        for metric in ("val_loss", "test_loss"):
            summary = cell.method.metrics[metric]
            row += [float(summary.mean), *map(float, summary.ci95)]
        values = took.get((size, name))
        row += (
            ["", "", "", ""]
            if values is None
            else [*middle(values), int(np.isfinite(values).sum())]
        )
        rows.append([*row, cell.seconds])
    header = ["hyperparameters", "method"]
    header += [
        f"{metric}{end}" for metric in ("val_loss", "test_loss") for end in ("", "_low", "_high")
    ]
    header += ["reached", "reached_low", "reached_high", "seeds_reached", "seconds"]
    write_csv(path, header, rows)
