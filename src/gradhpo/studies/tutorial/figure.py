"""The figure of the tutorial: convergence above, change against the untuned run below."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.report.drawing import COLORS, FAINT, INK, new_figure, save
from gradhpo.report.intervals import Summary, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["convergence"]

DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), "-", (0, (2.5, 1)), "-")


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
        widest = 0.0
        for i, (name, values) in enumerate(losses.items()):
            change = interval(100 * (values / losses["fixed"] - 1))
            widest = max(widest, float(np.abs(change.mean).max()))
            _line(upper, name, interval(values), i)
            _line(lower, name, change, i)
        if len(losses) > 1 and widest < 0.1:
            note = f"all lines coincide: at most {widest:.2g} % apart"
            lower.text(0.5, 0.06, note, color=INK, ha="center", transform=lower.transAxes)
    upper, lower = grid[:, 0]
    upper.set_yscale("log")
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


def _line(axes: "Axes", name: str, summary: Summary, i: int) -> None:
    """The mean with its band; "fixed" is black and lies under the others."""
    color = COLORS[6] if name == "fixed" else COLORS[(i - 1) % 6]
    width = 3.0 if name == "fixed" else 1.6
    x = np.arange(1, len(summary.mean) + 1)
    axes.plot(x, summary.mean, label=name, color=color, linewidth=width, linestyle=DASHES[i % 7])
    if np.isfinite(summary.ci95).all():
        axes.fill_between(x, *summary.ci95, color=color, alpha=0.13, linewidth=0)
