"""The figures of `gradhpo tune`: losses, every hyperparameter, the norm of the hypergradient."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.core.status import Status
from gradhpo.report.drawing import COLORS, FAINT, INK, new_axes, new_figure, styles
from gradhpo.report.intervals import interval
from gradhpo.report.lines import Line, draw_lines
from gradhpo.tuning.command import Outcome
from gradhpo.utils.logging import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

PANELS = 12  # hyperparameters drawn; all are in the logs


def figures(rows: Mapping[str, list[Outcome]], method: str) -> dict[str, Callable[[], "Figure"]]:
    """By the name of the file, a function that draws."""
    made = {
        "losses": lambda: _losses(rows),
        "hyperparams": lambda: _hyperparams(rows[method]),
    }
    norms = [row.trial.history.metrics["hypergrad_norm"] for row in rows[method]]
    if any((norm > 0).any() for norm in norms):  # of a search there is none
        made["hypergradient"] = lambda: _hypergradient(rows[method])
    return made


def _losses(rows: Mapping[str, list[Outcome]]) -> "Figure":
    figure = new_figure(6.4, 4.0)
    axes = new_axes(figure, "Validation loss, at the last batch of an episode", "episode", "")
    looks, lines = styles(rows), {}
    for name, each in rows.items():
        curves = [row.trial.history.metrics["val_loss"] for row in each]
        for curve in curves:
            x = np.arange(1, len(curve) + 1)
            axes.plot(x, curve, color=looks[name].color, linewidth=0.6, alpha=0.4)
        shortest = min(map(len, curves))
        mean = interval([curve[:shortest] for curve in curves]).mean
        lines[name] = Line(np.arange(1, shortest + 1), mean)
    draw_lines(axes, lines)
    return figure


def _hyperparams(rows: list[Outcome]) -> "Figure":
    names = list(rows[0].trial.history.hyperparams)
    shown = names[:PANELS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(2.6 * columns + 0.6, 2.0 * lines + 0.3)
    for place, name in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, place)
        # The name is the user's: no formula, whatever signs of dollars are in it.
        axes.set_title(printable(name), loc="left", color=INK, fontsize=9, parse_math=False)
        _bare(axes)
        paths = [row.trial.history.hyperparams[name] for row in rows]
        least, most = min(p.min() for p in paths), max(p.max() for p in paths)
        if least > 0 and most > 10 * least:
            axes.set_yscale("log")
        for path in paths:
            axes.plot(np.arange(len(path)), path, color=COLORS[0], linewidth=1.2, alpha=0.8)
        _whole_episodes(axes)
    title = "Hyperparameters by episode, a line for each seed"
    more = len(names) - len(shown)
    figure.suptitle(
        title + (f" (the first {PANELS} of {len(names)})" if more else ""),
        x=0.01,
        ha="left",
        color=INK,
        fontsize=11,
    )
    return figure


def _hypergradient(rows: list[Outcome]) -> "Figure":
    figure = new_figure(6.4, 3.2)
    title = "Norm of the hypergradient; crosses: episodes that end with a status other than OK"
    axes = new_axes(figure, title, "episode", "", size=10)
    axes.set_yscale("log", nonpositive="mask")
    for row in rows:
        metrics = row.trial.history.metrics
        norm, status = metrics["hypergrad_norm"], metrics["status"]
        episodes = np.arange(1, len(norm) + 1)
        axes.plot(episodes, norm, color=COLORS[0], linewidth=1.0, alpha=0.8)
        bad = status != Status.OK
        finite = norm[np.isfinite(norm) & (norm > 0)]
        height = np.where(np.isfinite(norm) & (norm > 0), norm, finite.min() if finite.size else 1)
        axes.plot(episodes[bad], height[bad], "x", color=COLORS[1], markersize=5)
    _whole_episodes(axes)
    return figure


def _bare(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=8)


def _whole_episodes(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0)
