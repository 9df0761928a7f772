"""Figures of the study `sinusoid`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.report import interval
from gradhpo.report.drawing import FAINT, INK, new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.sinusoid.published import CURVE, TEST_MSE
from gradhpo.studies.sinusoid.table import DIVERGED

__all__ = ["draw"]

Values = Mapping[str, Mapping[str, np.ndarray]]


def draw(title: str, values: Values, published: bool, path: Path) -> Path:
    """Learning curves beside the last errors, or, of many rows, the last errors alone.

    Curves are medians over seeds with the middle half of them: a test task that diverges for a
    while takes the mean along.
    """
    if len(values) > 8:  # more lines than have room for their names
        figure = new_figure(7.6, 1.2 + 0.24 * len(values))
        _last(figure, values, title, published=False)
        return save(figure, path)
    figure = new_figure(12.0, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1)).ravel()
    axes = new_axes(left, title, "meta-batches of ten inner-optimizations", "test error")
    axes.set_yscale("log", nonpositive="mask")
    lines = {}
    for name, each in values.items():
        low, middle, high = np.quantile(each["test_mse_by_epoch"], (0.25, 0.5, 0.75), axis=0)
        lines[name] = Line(np.arange(1, len(middle) + 1), middle, low, high)
        if published and name == "hyperdistill":
            axes.plot(list(CURVE), list(CURVE.values()), "x", color=INK, zorder=3)
            axes.plot([], [], "x", color=INK, label="published, hyperdistill")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    draw_lines(axes, lines)
    _last(right, values, " ", published)
    return save(figure, path)


def _last(figure: Any, values: Values, title: str, published: bool) -> None:
    """A row for each line of the table: a dot per seed, mean and interval, or an open dot at the
    median where seeds have diverged; the published interval below."""
    axes = new_axes(figure, title, "test error, mean of the last five meta-batches", "")
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="minor", labelsize=7)  # 3, 4 and 6 of a decade, close together
    looks = styles(_method(name) for name in values)
    for i, (name, each) in enumerate(values.items()):
        summary, (color, _, marker) = interval(each["test_mse"]), looks[_method(name)]
        shown = summary.seeds[summary.seeds < DIVERGED]
        axes.plot(shown, np.full(len(shown), i), ".", color=FAINT, markersize=4)
        if len(shown) < len(summary.seeds):
            at = min(float(np.median(summary.seeds)), DIVERGED)
            axes.plot(at, i, marker, color=color, markerfacecolor="white", markersize=6)
        else:
            axes.hlines(i, *summary.ci95, color=color, linewidth=2)
            axes.plot(summary.mean, i, marker, color=color, markersize=6)
        if published and name in TEST_MSE:
            mean, half = TEST_MSE[name]
            label = "published" if not i else None
            axes.hlines(i + 0.28, mean - half, mean + half, color=INK, linewidth=1)
            axes.plot(mean, i + 0.28, "x", color=INK, markersize=5, label=label)
    if published:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.grid(axis="x", color="#EBEBEB", linewidth=0.8)


def _method(name: str) -> str:
    """Of a row "setting: method"."""
    return name.rpartition(": ")[2]
