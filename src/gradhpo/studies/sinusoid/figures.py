"""Figures of the study `sinusoid`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.report import interval
from gradhpo.report.drawing import COLORS, FAINT, INK, label_ends, new_axes, new_figure, save
from gradhpo.studies.sinusoid.published import CURVE, TEST_MSE

__all__ = ["draw"]


def draw(config: Any, values: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """Learning curves beside the last errors, or, of many rows, the last errors alone."""
    title = f"{config.setting}, {config.seeds} seed{'s' * (config.seeds != 1)}"
    if len(values) > len(COLORS):
        figure = new_figure(7.6, 1.2 + 0.24 * len(values))
        _last(figure, values, title, published=False)
        return save(figure, path)
    published = config.setting == "published"
    figure = new_figure(12.0, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1)).ravel()
    axes = new_axes(left, title, "inner-optimizations / 10", "test error (mean square)")
    axes.set_yscale("log", nonpositive="mask")
    ends = []
    for color, (name, each) in zip(COLORS, values.items(), strict=False):
        summary = interval(each["test_mse_by_epoch"])
        mean, (low, high) = summary.mean, summary.ci95
        x = np.arange(1, len(mean) + 1)
        axes.plot(x, mean, color=color, linewidth=1.8)
        axes.fill_between(x, np.maximum(low, mean / 10), high, color=color, alpha=0.15, linewidth=0)
        last = np.flatnonzero(np.isfinite(mean))[-1:]
        ends.append((name, color, x[last], mean[last]))
        if published and name == "hyperdistill":
            axes.plot(list(CURVE), list(CURVE.values()), "x", color=color, label="published")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    axes.margins(x=0)
    label_ends(axes, ends)
    _last(right, values, " ", published)
    return save(figure, path)


def _last(
    figure: Any, values: Mapping[str, Mapping[str, np.ndarray]], title: str, published: bool
) -> None:
    """A row for each line of the table: mean, interval, a dot per seed, the published interval."""
    axes = new_axes(figure, title, "test error, mean of the last five meta-batches", "")
    axes.set_xscale("log")
    for i, (name, each) in enumerate(values.items()):
        summary, color = interval(each["test_mse"]), COLORS[i % len(COLORS)]
        axes.plot(summary.seeds, np.full(len(summary.seeds), i), ".", color=FAINT, markersize=4)
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
