"""The figure of the study: losses against gradients, and the rates that were found."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.intervals import interval
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.image_training.problem import KNOTS, LAYERS

__all__ = ["draw"]


def draw(
    losses: Mapping[str, np.ndarray],
    used: Mapping[str, list[dict[str, float]]],
    budget: float,
    path: Path,
) -> None:
    """Lowest validation loss so far, and the rates of the first method beside those by hand.

    Args:
        losses: By method, (seeds, parts of the budget).
        used: By method, the hyperparameters of every seed, by name.
        budget: In gradients.
    """
    figure = new_figure(10.4, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False).ravel()
    axes = new_axes(left, "Lowest validation loss so far", "gradients", "")
    lines = {}
    for method, each in losses.items():
        summary = interval(each)
        spent = budget * np.arange(1, each.shape[1] + 1) / each.shape[1]
        lines[method] = Line(spent, summary.mean, *(summary.ci95 if len(each) > 2 else ()))
    draw_lines(axes, lines)

    method, runs = next(iter(used.items()))
    title = f"Rates found by {method}, geometric means over seeds"
    axes = new_axes(right, title, "part of the training", "")
    axes.set_yscale("log")
    lines = {
        layer: Line(KNOTS, np.exp(np.mean([np.log(_rates(each, layer)) for each in runs], 0)))
        for layer in LAYERS
    }
    if "fixed" in used:
        lines["by hand"] = Line(KNOTS, _rates(used["fixed"][0], LAYERS[0]))
    draw_lines(axes, lines)
    save(figure, path)


def _rates(used: Mapping[str, float], layer: str) -> list[float]:
    return [used[f"rate/{layer}/{i}"] for i in range(len(KNOTS))]
