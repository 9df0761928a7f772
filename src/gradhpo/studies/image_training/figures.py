"""The figure of the study: losses against gradients, and the rates that were found."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradhpo.report.drawing import COLORS, INK, label_ends, new_axes, new_figure, save
from gradhpo.report.intervals import interval
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
    axes = new_axes(left, "Lowest validation loss so far", "thousand gradients", "")
    ends = []
    for color, (method, each) in zip(COLORS, losses.items(), strict=False):
        summary = interval(each)
        mean, (low, high) = summary.mean, summary.ci95
        x = budget / 1000 * np.arange(1, len(mean) + 1) / len(mean)
        axes.plot(x, mean, color=color, linewidth=1.8)
        if len(each) > 2:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ends.append((method, color, x[-1:], mean[-1:]))
    axes.margins(x=0)
    label_ends(axes, ends)

    method, runs = next(iter(used.items()))
    title = f"Rates found by {method}, geometric means over seeds"
    axes = new_axes(right, title, "part of the training", "")
    axes.set_yscale("log")
    ends = []
    for color, layer in zip(COLORS, LAYERS, strict=False):
        rates = [[each[f"rate/{layer}/{i}"] for i in range(len(KNOTS))] for each in runs]
        mean = np.exp(np.log(rates).mean(0))
        axes.plot(KNOTS, mean, color=color, linewidth=1.8, marker=".")
        ends.append((layer, color, np.array(KNOTS[-1:]), mean[-1:]))
    if "fixed" in used:
        by_hand = [used["fixed"][0][f"rate/{LAYERS[0]}/{i}"] for i in range(len(KNOTS))]
        axes.plot(KNOTS, by_hand, color=INK, linewidth=1, linestyle=":")
        ends.append(("by hand", INK, np.array(KNOTS[-1:]), np.array(by_hand[-1:])))
    axes.margins(x=0)
    label_ends(axes, ends)
    save(figure, path)
