"""Tables and figures of the study: the published numbers stand beside ours."""

from pathlib import Path

import numpy as np

from gradhpo.report import interval, plots, write_csv
from gradhpo.report.drawing import COLORS, INK, new_axes, new_figure, save
from gradhpo.studies.schedule import published
from gradhpo.studies.schedule.export import plain
from gradhpo.studies.schedule.problem import Schedule

__all__ = [
    "draw_meta_curve",
    "draw_schedules",
    "draw_training",
    "write_meta_curve",
    "write_training",
]


def write_meta_curve(losses: np.ndarray, path: Path) -> None:
    """Our losses by meta-iteration beside the published ones."""
    summary = interval(losses)
    table = []
    for i in range(losses.shape[1]):
        k, between = divmod(i, published.EVERY)
        theirs = "" if between or k >= len(published.META_CURVE) else published.META_CURVE[k]
        low, high = (x[i] for x in summary.ci95)
        table.append([i, summary.mean[i], low, high, theirs])
    write_csv(path, ["meta_iteration", "mean", "low", "high", "published"], table)


def write_training(curves: dict[str, np.ndarray], path: Path) -> None:
    """Our losses by training step beside the published ones."""
    table = []
    for t in range(1, len(curves["initial"])):
        row = [t, curves["initial"][t - 1], "", curves["learned"][t - 1], ""]
        if t in published.STEPS[:-1]:
            i = published.STEPS.index(t)
            row[2], row[4] = published.INITIAL[i], published.LEARNED[i]
        table.append(row)
    header = ["step", "initial", "initial, published", "learned", "learned, published"]
    write_csv(path, header, table)


def draw_meta_curve(dataset: str, losses: np.ndarray, path: Path) -> None:
    title = f"{dataset}, {len(losses)} meta-optimizations"
    figure = new_figure(5.6, 3.8)
    axes = new_axes(figure, title, "meta-iteration", "training loss at the end")
    for each in losses:
        axes.plot(each, color=COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(losses.mean(axis=0), color=COLORS[0], label="here, mean and each")
    at = published.EVERY * np.arange(len(published.META_CURVE))
    axes.plot(at, published.META_CURVE, "o", color=COLORS[1], label="published")
    axes.legend(frameon=False, labelcolor=INK)
    save(figure, path)


def draw_training(dataset: str, curves: dict[str, np.ndarray], path: Path) -> None:
    plots.curves(
        {name: curve[None] for name, curve in curves.items()},
        path,
        "training step",
        "loss on all training examples",
        f"{dataset}, one fresh seed",
        log_y=True,
        band=False,
    )


def draw_schedules(lam: Schedule, path: Path) -> None:
    figure = new_figure(9.6, 3.8)
    panels = figure.subfigures(1, 2, squeeze=False).ravel()
    tables = plain(lam)
    for panel, name in zip(panels, ("learning_rate", "momentum"), strict=True):
        axes = new_axes(panel, name.replace("_", " "), "training step", "")
        for i, label in enumerate(tables["groups"]):
            if label.startswith("weights"):  # of the biases see schedule.json
                values = np.array(tables[name])[:, i]
                steps = np.arange(1, len(values) + 1)
                axes.plot(steps, values, label=label, linewidth=1, color=COLORS[i // 2])
    panels[0].axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    save(figure, path)
