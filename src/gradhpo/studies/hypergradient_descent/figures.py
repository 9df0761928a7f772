"""Figures of the study `hypergradient_descent`: training loss, validation loss, learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gradhpo.report.drawing import COLORS, FAINT, INK, new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.hypergradient_descent.training import Curves

__all__ = ["passages", "panels", "tuning"]


def panels(curves: Mapping[str, Curves], path: Path, title: str) -> Path:
    """Three panels, a line per method: means over seeds, the training loss also over 1/20 epoch."""
    figure = new_figure(12.6, 3.6)
    seeds, epochs, steps = next(iter(curves.values())).train_loss.shape
    title = f"{title}, {seeds} seed{'s' * (seeds != 1)}"
    block = max(1, steps // 20)
    for i, (panel, label) in enumerate(
        zip(
            figure.subfigures(1, 3, squeeze=False).ravel(),
            ("training loss", "validation loss", "learning rate"),
            strict=True,
        )
    ):
        axes = new_axes(panel, " " if i else title, "epoch", label)
        if i < 2:
            axes.set_yscale("log")
        elif len(curves) > 2:  # rates of different magnitudes, some of them negative at times
            axes.set_yscale("symlog", linthresh=1e-4)
        lines = {}
        for name, each in curves.items():
            if i == 1:
                x, y = np.arange(1, epochs + 1), each.val_loss.mean(0)
            else:
                y = (each.learning_rate if i else each.train_loss).reshape(seeds, -1).mean(0)
                x = np.arange(1, len(y) + 1) / steps
            if i == 0:
                whole = len(y) // block * block
                x, y = (values[:whole].reshape(-1, block).mean(1) for values in (x, y))
            lines[name] = Line(x, y)
        draw_lines(axes, lines)
    return save(figure, path)


def tuning(curves: Mapping[str, Sequence[Curves]], path: Path, title: str) -> Path:
    """Three panels by epoch, a line per method and initial rate, dotted without a learned rate.

    A cross stands at the top where a line has left for 10 or NaN.
    """
    figure = new_figure(13.4, 4.0)
    for i, (panel, label) in enumerate(
        zip(
            figure.subfigures(1, 3, squeeze=False, width_ratios=(1, 1, 1.35)).ravel(),
            ("training loss", "validation loss", "learning rate"),
            strict=True,
        )
    ):
        axes = new_axes(panel, " " if i else title, "epoch", label)
        axes.set_yscale("log", nonpositive="mask")
        gone: list[tuple[int, str]] = []
        for name, (color, dashes, _) in styles(curves).items():
            for k, each in enumerate(curves[name]):
                means = each.train_loss.mean(-1), each.val_loss, each.learning_rate.mean(-1)
                y = means[i].mean(0)
                y = np.where(np.abs(y) < 10, y, np.nan)
                x, label = np.arange(1, len(y) + 1), name if not k else None
                axes.plot(x, y, color=color, linestyle=dashes, linewidth=1.3, label=label)
                gone += [(int(x[at]), color) for at in np.flatnonzero(np.isnan(y))[:1]]
        _, top = axes.get_ylim()
        for x, color in gone:
            axes.plot(x, top, "x", color=color, clip_on=False)
        if i == 2:
            legend = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "frameon": False}
            axes.legend(fontsize=8, labelcolor=INK, **legend)
    return save(figure, path)


def passages(
    found: Mapping[str, np.ndarray],
    published: Mapping[str, Sequence[Sequence[int]]],
    axes_values: tuple[Sequence[float], Sequence[float]],
    cap: int,
    path: Path,
) -> Path:
    """A panel per method: median iterations over beta with their 10-90 % range, by initial rate.

    Args:
        found: Method to iterations (seeds, initial rates, betas), the cap where not reached.
        published: Method to the same without seeds; drawn as crosses.
        axes_values: The initial rates and the betas.
        cap: Upper end of the axis.
        path: File to write.
    """
    rates, betas = axes_values
    figure = new_figure(12.6, 3.8)
    for i, (panel, (name, values)) in enumerate(
        zip(figure.subfigures(1, len(found), squeeze=False).ravel(), found.items(), strict=True)
    ):
        axes = new_axes(panel, name, "beta", "" if i else "iterations to a loss of 0.29")
        axes.set(xscale="log", yscale="log", ylim=(10, 1.3 * cap))
        low, middle, high = np.percentile(values, (10, 50, 90), axis=0)
        for k, (rate, color) in enumerate(zip(rates, COLORS, strict=False)):
            axes.plot(betas, middle[k], color=color, linewidth=1.4, label=f"{rate:g}")
            axes.fill_between(betas, low[k], high[k], color=color, alpha=0.12, linewidth=0)
            theirs = np.minimum(published[name][k], cap)
            axes.plot(betas, theirs, "x", color=color, markersize=5)
        axes.axhline(cap, color=FAINT, linewidth=0.8)
        if not i:
            axes.legend(title="from", frameon=False, fontsize=8, labelcolor=INK, loc="upper center")
    return save(figure, path)
