"""The table of the study and its figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gradhpo.report import interval, paired, write_csv
from gradhpo.report.drawing import FAINT, new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.meta_weight_net.training import NET
from gradhpo.studies.shared.cells import ends

__all__ = ["BASELINES", "Results", "Row", "Trial", "draw_accuracy", "draw_weights", "rows", "told"]

BASELINES = ("untouched", "stopped", "clean", "mixed")


class Trial(NamedTuple):
    """One seed of one method."""

    accuracy: float  # on test data, at the end
    val_accuracy: float
    curve: np.ndarray | None = None  # of the accuracy, (points,)
    detections: np.ndarray | None = None  # (points, 4), see `Detection`
    hyperparams: Any = None  # the weights of V at the end

    def told(self) -> str:
        text = f"test accuracy {100 * self.accuracy:.2f} %"
        if self.detections is None:
            return text
        _, auc, clean, wrong = self.detections[-1]
        return (
            f"{text}, AUC {auc:.3f}, weights {clean:.2f} of right and {wrong:.2f} of wrong labels"
        )


Results = dict[str, dict[str, list[Trial]]]
"""By cell (how many clean images) and method, an entry per seed."""


class Row(NamedTuple):
    """A method: means over seeds, and paired differences, with the ends of 95 % intervals."""

    cell: str
    method: str
    accuracy: tuple[float, float, float]
    more: dict[str, tuple[float, float, float]]  # than each baseline
    auc: tuple[float, float, float] | None
    weights: tuple[float, float] | None  # mean weight of right and of wrong labels


def rows(results: Results) -> list[Row]:
    """A row per cell and method."""
    table = []
    for cell, found in results.items():
        accuracies = {m: [trial.accuracy for trial in trials] for m, trials in found.items()}
        for method, trials in found.items():
            more = {
                other: ends(paired(accuracies[method], accuracies[other]).seeds)
                for other in BASELINES
                if method not in BASELINES
            }
            last = [trial.detections[-1] for trial in trials if trial.detections is not None]
            auc = weights = None
            if last:
                _, aucs, clean, wrong = np.transpose(last)
                auc, weights = ends(aucs), (float(clean.mean()), float(wrong.mean()))
            table.append(Row(cell, method, ends(accuracies[method]), more, auc, weights))
    return table


def told(row: Row) -> str:
    """A line of the table, in percent."""
    mean, low, high = (100 * x for x in row.accuracy)
    text = f"{row.cell}, {row.method}: {mean:.1f} [{low:.1f}, {high:.1f}] %"
    for other, difference in row.more.items():
        mean, low, high = (100 * x for x in difference)
        text += f", {mean:+.1f} [{low:+.1f}, {high:+.1f}] to {other}"
    return text if row.auc is None else f"{text}, AUC {row.auc[0]:.3f}"


def write(table: Sequence[Row], path: Path) -> None:
    """A row per cell and method; a mean and the ends of its interval in three columns."""
    nothing = (None, None, None)
    header = ["cell", "method"]
    for name in ("accuracy", *(f"more than {other}" for other in BASELINES), "auc"):
        header += [name, f"{name} low", f"{name} high"]
    lines = [
        [
            *(row.cell, row.method, *row.accuracy),
            *(x for other in BASELINES for x in row.more.get(other, nothing)),
            *(row.auc or nothing),
            *(row.weights or (None, None)),
        ]
        for row in table
    ]
    write_csv(path, [*header, "weight right", "weight wrong"], lines)


def draw_accuracy(results: Results, steps: int, path: Path) -> Path:
    """A panel per cell: test accuracy over the steps."""
    figure = new_figure(6.0 * len(results), 3.9)
    panels = figure.subfigures(1, len(results), squeeze=False).ravel()
    for i, (panel, (cell, found)) in enumerate(zip(panels, results.items(), strict=True)):
        axes = new_axes(panel, f"{cell} images", "steps", "" if i else "test accuracy")
        lines = {}
        for method, trials in found.items():
            if trials[0].curve is not None:
                summary = interval([trial.curve for trial in trials if trial.curve is not None])
                x = np.linspace(0, steps, len(summary.mean) + 1)[1:]
                lines[method] = Line(x, summary.mean, *(summary.ci95 if len(trials) > 2 else ()))
        draw_lines(axes, lines, within=(0, 1))
    return save(figure, path)


def draw_weights(results: Results, path: Path) -> Path:
    """A panel per method: V at the end, a line per seed, of the cell with most clean images."""
    cell, found = next(iter(results.items()))
    learned = {m: trials for m, trials in found.items() if trials[0].hyperparams is not None}
    if not learned:
        learned = {"untouched": []}
    figure = new_figure(1 + 2.1 * len(learned), 2.7)
    panels = figure.subfigures(1, len(learned), squeeze=False).ravel()
    losses, looks = np.linspace(0, 8, 81), styles(learned)
    for i, (panel, (method, trials)) in enumerate(zip(panels, learned.items(), strict=True)):
        axes = new_axes(panel, method, "loss", "" if i else f"weight, {cell}", size=9)
        for trial in trials:
            weights = np.asarray(NET(trial.hyperparams, jnp.asarray(losses, jnp.float32)))
            axes.plot(losses, weights, color=looks[method].color, linewidth=1.2)
        axes.axhline(0.5, color=FAINT, linewidth=0.8)
        axes.set_ylim(0, 1)
    return save(figure, path)
