"""Figures of the study `sinusoid`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.report import interval
from gradhpo.report.drawing import COLORS, FAINT, INK, label_ends, new_axes, new_figure, save
from gradhpo.studies.sinusoid.published import CURVE, TEST_MSE
from gradhpo.studies.sinusoid.table import DIVERGED

__all__ = ["draw"]

Values = Mapping[str, Mapping[str, np.ndarray]]


def draw(title: str, values: Values, published: bool, path: Path) -> Path:
    """Learning curves beside the last errors, or, of many rows, the last errors alone.

    Curves are medians over seeds with the middle half of them: a test task that diverges for a
    while takes the mean along.
    """
    if len(values) > len(COLORS):
        figure = new_figure(7.6, 1.2 + 0.24 * len(values))
        _last(figure, values, title, published=False)
        return save(figure, path)
    figure = new_figure(12.0, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1)).ravel()
    axes = new_axes(left, title, "meta-batches of ten inner-optimizations", "test error")
    axes.set_yscale("log", nonpositive="mask")
    ends = []
    for color, (name, each) in zip(COLORS, values.items(), strict=False):
        curve = each["test_mse_by_epoch"]
        low, middle, high = np.quantile(curve, (0.25, 0.5, 0.75), axis=0)
        x = np.arange(1, len(middle) + 1)
        axes.plot(x, middle, color=color, linewidth=1.8)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        last = np.flatnonzero(np.isfinite(middle))[-1:]
        ends.append((name, color, x[last], middle[last]))
        if published and name == "hyperdistill":
            axes.plot(list(CURVE), list(CURVE.values()), "x", color=color, label="published")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    axes.margins(x=0)
    label_ends(axes, ends)
    _last(right, values, " ", published)
    return save(figure, path)


def _last(figure: Any, values: Values, title: str, published: bool) -> None:
    """A row for each line of the table: a dot per seed, mean and interval, or an open dot at the
    median where seeds have diverged; the published interval below."""
    axes = new_axes(figure, title, "test error, mean of the last five meta-batches", "")
    axes.set_xscale("log")
    methods = list(dict.fromkeys(_method(name) for name in values))
    for i, (name, each) in enumerate(values.items()):
        summary, color = interval(each["test_mse"]), COLORS[methods.index(_method(name)) % 7]
        shown = summary.seeds[summary.seeds < DIVERGED]
        axes.plot(shown, np.full(len(shown), i), ".", color=FAINT, markersize=4)
        if len(shown) < len(summary.seeds):
            at = min(float(np.median(summary.seeds)), DIVERGED)
            axes.plot(at, i, "o", color=color, markerfacecolor="white", markersize=6)
        else:
            axes.hlines(i, *summary.ci95, color=color, linewidth=2)
            axes.plot(summary.mean, i, "o", color=color, markersize=6)
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
