"""The figure of the study: losses, and what it takes to be as low as random search."""

from pathlib import Path

import numpy as np

from gradhpo.report.drawing import COLORS, FAINT, INK, label_ends, new_axes, new_figure, save
from gradhpo.studies.crossover.reaching import Cells, all_reached, middle

__all__ = ["draw"]


def draw(cells: Cells, budget: float, path: Path) -> None:
    """Three panels over the number of hyperparameters: validation loss, test loss, gradients until
    the validation loss is that of random search in the end."""
    figure = new_figure(13.4, 4.0)
    names = list(dict.fromkeys(name for _, name in cells))
    colors = dict(zip(names, COLORS, strict=False))
    took = {(size, name): middle(values) for size, name, values in all_reached(cells, budget)}
    panels = figure.subfigures(1, 3 if took else 2, squeeze=False).ravel()
    for panel, metric, title in zip(
        panels, ("val_loss", "test_loss"), ("Validation loss", "Test loss"), strict=False
    ):
        axes = new_axes(panel, title, "hyperparameters", "")
        ends = []
        for name, color in colors.items():
            sizes = [size for size, each in cells if each == name]
            summaries = [cells[size, name].method.metrics[metric] for size in sizes]
            mean, ends_of = np.array([s.mean for s in summaries]), [s.ci95 for s in summaries]
            axes.plot(sizes, mean, "o-", markersize=3.5, linewidth=1.6, color=color)
            low, high = np.array(ends_of).T
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
            ends.append((name, color, np.array(sizes[-1:]), mean[-1:]))
        axes.set_xscale("log")
        axes.margins(x=0)
        label_ends(axes, ends)
    if took:
        axes = new_axes(panels[2], "Share of random search's gradients", "hyperparameters", "")
        never, ends = 2.0, []
        for name, color in colors.items():
            if name == "random":
                continue
            sizes = [size for size, each in cells if each == name]
            shares = np.array([took[size, name] for size in sizes]) / budget
            shares = np.where(np.isfinite(shares), shares, never)
            axes.plot(sizes, shares[:, 0], "o-", markersize=3.5, linewidth=1.6, color=color)
            axes.fill_between(
                sizes, shares[:, 1], shares[:, 2], color=color, alpha=0.12, linewidth=0
            )
            ends.append((name, color, np.array(sizes[-1:]), shares[-1:, 0]))
        axes.axhline(0.1, color=INK, linewidth=1, linestyle=":")
        axes.axhline(1.0, color=FAINT, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_yticks([0.025, 0.1, 0.5, 1.0, never], ["1/40", "1/10", "1/2", "all", "never"])
        axes.minorticks_off()
        axes.margins(x=0)
        label_ends(axes, ends)
    save(figure, path)
