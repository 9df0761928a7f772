"""The figure of the tutorial: convergence above, change against the untuned run below."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.report.drawing import FAINT, INK, new_figure, save
from gradhpo.report.intervals import Summary, interval
from gradhpo.report.lines import Line, draw_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["convergence"]


def convergence(panels: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> Path:
    """Draw one column per panel: losses by method, the mean over seeds with its 95 % band.

    Args:
        panels: By title, arrays (seeds, episodes) by method; "fixed" must be among them, and
            the changes below are against it, seed by seed. All columns share their scales.
        path: File to write; parents are created.

    Returns:
        The path.

    Raises:
        ImportError: Matplotlib is not installed.

    >>> import tempfile
    >>> losses = {"fixed": np.array([[2.0, 1.0], [3.0, 1.5]])}
    >>> convergence({"a": losses}, tempfile.mkdtemp() + "/a.png").name
    'a.png'
    """
    figure = new_figure(1.2 + 4.5 * len(panels), 6.2)
    grid = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (title, losses) in zip(grid.T, panels.items(), strict=True):
        _style(upper)
        _style(lower)
        upper.set_title(title, loc="left", color=INK, fontsize=11)
        lower.axhline(0, color=FAINT, linewidth=0.8)
        lower.set_xlabel("episode", color=INK)
        upper.set_yscale("log")
        changes = {name: interval(100 * (x / losses["fixed"] - 1)) for name, x in losses.items()}
        for axes, shown in (upper, {n: interval(x) for n, x in losses.items()}), (lower, changes):
            draw_lines(axes, {name: _line(each) for name, each in shown.items()}, names=False)
        widest = max(float(np.abs(change.mean).max()) for change in changes.values())
        if len(losses) > 1 and widest < 0.1:
            note = f"all lines coincide: at most {widest:.2g} % apart"
            lower.text(0.5, 0.06, note, color=INK, ha="center", transform=lower.transAxes)
    upper, lower = grid[:, 0]
    for axis in (upper.yaxis.set_major_formatter, upper.yaxis.set_minor_formatter):
        axis("{x:g}")
    upper.set_ylabel("validation loss", color=INK)
    lower.set_ylabel("change against fixed, %", color=INK)
    handles, _ = max(
        (axes.get_legend_handles_labels() for axes in grid[0]), key=lambda h: len(h[0])
    )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        handlelength=3,
    )
    return save(figure, path)


def _style(axes: "Axes") -> None:
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", which="both", color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)


def _line(summary: Summary) -> Line:
    """The mean with its band, if there is one."""
    band = summary.ci95 if np.isfinite(summary.ci95).all() else ()
    return Line(np.arange(1, len(summary.mean) + 1), summary.mean, *band)
