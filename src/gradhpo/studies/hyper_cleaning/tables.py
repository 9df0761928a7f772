"""The table of the study with the published one beside it, and its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradhpo.report import interval, write_csv
from gradhpo.report.drawing import COLORS, INK, new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.hyper_cleaning.published import ACCURACY
from gradhpo.studies.hyper_cleaning.training import Momentum, Run
from gradhpo.studies.shared.cells import ends
from gradhpo.studies.shared.detection import Detection, detection

__all__ = [
    "Cell",
    "Results",
    "Row",
    "Trial",
    "draw_accuracy",
    "draw_weights",
    "rows",
    "told",
    "write_detection",
    "write_table",
]


class Cell(NamedTuple):
    """What a group of rows of the table is about."""

    dataset: str
    noise: float
    momentum: Momentum

    def __str__(self) -> str:
        return f"{self.dataset} {self.noise:g} {self.momentum}"


class Trial(NamedTuple):
    """A run of one seed; `wrong` marks the training labels that noise has changed."""

    run: Run
    wrong: np.ndarray


Results = dict[Cell, dict[str, list[Trial]]]
"""By cell and method, an entry per seed."""


class Row(NamedTuple):
    """A method in a cell: means over seeds with the ends of their 95 % intervals."""

    dataset: str
    label_noise: float
    momentum: str
    method: str
    products: float  # of second order, per update
    accuracy: float  # on test data, over the last eighth of the run
    low: float
    high: float
    stopped: float  # at the update where the validation accuracy is highest
    stopped_low: float
    stopped_high: float
    auc: float
    published: float | None
    published_half: float | None  # of its 95 % interval


def rows(results: Results, products: Mapping[str, float]) -> list[Row]:
    """A row per cell and method."""
    table = []
    for cell, found in results.items():
        for method, trials in found.items():
            last = ends([trial.run.last[1] for trial in trials])
            stopped = ends([trial.run.stopped for trial in trials])
            auc = float(np.mean([detection(run.weights, wrong).auc for run, wrong in trials]))
            known = ACCURACY.get(cell[:2], {}).get(method, (None, None))
            table.append(Row(*cell, method, products[method], *last, *stopped, auc, *known))
    return table


def told(row: Row) -> str:
    """A line of the table, in percent."""
    text = (
        f"{row.dataset} {row.label_noise:g} {row.momentum}, {row.method}: "
        f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}] %, stopped early "
        f"{100 * row.stopped:.1f} %, AUC {row.auc:.3f}"
    )
    if row.published is None or row.published_half is None:
        return text
    return f"{text}; published {100 * row.published:.1f} ± {100 * row.published_half:.1f} %"


def write_table(table: Sequence[Row], path: Path) -> None:
    write_csv(path, list(Row._fields), [list(row) for row in table])


def write_detection(results: Results, path: Path) -> None:
    """A row per cell, method and seed."""
    table = [
        [*cell, method, seed, *detection(trial.run.weights, trial.wrong)]
        for cell, found in results.items()
        for method, trials in found.items()
        for seed, trial in enumerate(trials)
        if method != "fixed"
    ]
    header = ["dataset", "label_noise", "momentum", "method", "seed", *Detection._fields]
    write_csv(path, header, table)


def draw_accuracy(results: Results, updates: int, path: Path) -> Path:
    """A panel per cell: test accuracy over the updates, the published accuracies as ticks."""
    momenta = list(dict.fromkeys(cell.momentum for cell in results))
    columns = list(dict.fromkeys(cell[:2] for cell in results))
    figure = new_figure(1 + 3.9 * len(columns), 0.4 + 3.0 * len(momenta))
    panels = figure.subfigures(len(momenta), len(columns), squeeze=False)
    for cell, found in results.items():
        i, j = momenta.index(cell.momentum), columns.index(cell[:2])
        title = f"{cell.dataset}, {100 * cell.noise:g} % replaced, momentum {cell.momentum}"
        axes = new_axes(panels[i, j], title, "updates", "" if j else "test accuracy", size=9)
        looks, lines = styles(found), {}
        for method, trials in found.items():
            summary = interval([trial.run.test[:, 1] for trial in trials])
            x = np.linspace(0, updates, len(summary.mean) + 1)[1:]
            lines[method] = Line(x, summary.mean, *(summary.ci95 if len(trials) > 2 else ()))
            published = ACCURACY.get(cell[:2], {}).get(method)
            if published is not None:
                style = {"color": looks[method].color, "markersize": 5, "clip_on": False}
                axes.plot(updates, published[0], "<", **style)
        draw_lines(axes, lines, within=(0, 1))
    return save(figure, path)


def draw_weights(results: Results, path: Path) -> Path:
    """A row per cell, a panel per method: how the weights of all seeds' examples are spread."""
    methods = [m for m in next(iter(results.values())) if m != "fixed"] or ["fixed"]
    figure = new_figure(1 + 2.3 * len(methods), 0.4 + 2.0 * len(results))
    panels = figure.subfigures(len(results), len(methods), squeeze=False)
    runs = [run for found in results.values() for method in methods for run, _ in found[method]]
    most = max(1.0, *(float(np.max(run.weights)) for run in runs))  # with a budget above 1
    bins = np.linspace(0, most, 21).tolist()
    for (cell, found), across in zip(results.items(), panels, strict=True):
        for i, (panel, method) in enumerate(zip(across, methods, strict=True)):
            label = "" if i else "examples"
            axes = new_axes(panel, f"{cell}: {method}", "weight", label, size=8)
            weights, wrong = (
                np.concatenate(each)
                for each in zip(
                    *((run.weights, wrong) for run, wrong in found[method]), strict=True
                )
            )
            for name, color, chosen in (("right", COLORS[0], ~wrong), ("wrong", COLORS[1], wrong)):
                axes.hist(weights[chosen], bins, color=color, alpha=0.6, label=f"{name} label")
            if panel is panels[0, 0]:
                axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return save(figure, path)
