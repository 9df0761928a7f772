"""The figure of the study: losses, and what it takes to be as low as random search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.report.drawing import (
    FAINT,
    INK,
    label_ends,
    new_axes,
    new_figure,
    save,
    styles,
)
from gradhpo.studies.crossover.reaching import Cells, all_reached, middle
from gradhpo.utils._styles import Style

__all__ = ["draw"]

Lines = dict[str, tuple[list[int], np.ndarray]]
"""By name of the method: numbers of hyperparameters, and (numbers, 3) of middle, low and high."""
NEVER = 2.0  # where the axis of shares has what was not reached


def draw(cells: Cells, budget: float, path: Path) -> None:
    """Three panels over the number of hyperparameters: validation loss, test loss, gradients until
    the validation loss is that of random search in the end; the last where there is random search.
    """
    took = {(size, name): middle(values) for size, name, values in all_reached(cells, budget)}
    figure = new_figure(13.4, 4.0)
    panels = figure.subfigures(1, 3 if took else 2, squeeze=False).ravel()
    looks = styles(dict.fromkeys(name for _, name in cells))
    for panel, metric, title in zip(
        panels, ("val_loss", "test_loss"), ("Validation loss", "Test loss"), strict=False
    ):
        summaries = {key: cell.method.metrics[metric] for key, cell in cells.items()}
        found = {key: (float(each.mean), *each.ci95) for key, each in summaries.items()}
        _panel(panel, title, _lines(found), looks)
    if took:
        shares = {key: np.minimum(np.array(each) / budget, NEVER) for key, each in took.items()}
        lines = _lines(shares)
        del lines["random"]
        axes = _panel(panels[2], "Share of the gradients until random's end", lines, looks, True)
        axes.axhline(0.1, color=INK, linewidth=1, linestyle=":")
        axes.axhline(1.0, color=FAINT, linewidth=1)
    save(figure, path)


def _lines(found: Mapping[tuple[int, str], Any]) -> Lines:
    of_names = {name: [n for n, each in found if each == name] for _, name in found}
    return {
        name: (sizes, np.array([found[size, name] for size in sizes]))
        for name, sizes in of_names.items()
    }


def _panel(
    panel: Any, title: str, lines: Lines, looks: Mapping[str, Style], shares: bool = False
) -> Any:
    axes = new_axes(panel, title, "hyperparameters", "")
    axes.set_xscale("log")
    ends, last = [], max(sizes[-1] for sizes, _ in lines.values())
    for name, (sizes, values) in lines.items():
        (centre, low, high), (color, dash, marker) = values.T, looks[name]
        axes.plot(sizes, centre, dash, marker=marker, markersize=5, linewidth=1.6, color=color)
        axes.fill_between(sizes, low, high, color=color, alpha=0.12, linewidth=0)
        if sizes[-1] == last:
            ends.append((name, color, np.array(sizes[-1:]), centre[-1:]))
        else:  # a line from here to the margin would look like a result
            axes.text(sizes[-1], centre[-1], f"  {name}", color=color, fontsize=9)
    if shares:
        axes.set_yscale("log")
        ticks = {0.025: "1/40", 0.1: "1/10", 0.5: "1/2", 1.0: "all", NEVER: "never"}
        axes.set_yticks([*ticks], [*ticks.values()])
        axes.minorticks_off()
    axes.margins(x=0.02)
    label_ends(axes, ends)
    return axes
