"""Curves with a name each: their looks, their bands, and which of them coincide."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradhpo.report.drawing import label_ends, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "draw_lines"]

APART = 0.005  # of the axes' height: half the width of a line
MARKERS = 5  # of a line with many points; fewer where its points go round many lines


class Line(NamedTuple):
    """A curve, arrays of shape `(points,)`, and its band if it has one."""

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


def draw_lines(
    axes: "Axes",
    lines: Mapping[str, Line],
    *,
    within: tuple[float, float] = (-np.inf, np.inf),
    names: bool = True,
) -> None:
    """Draw each line in the look of its name, and write the name at its right end.

    To be called last, for names stand where the limits of the axes put the ends. Lines on top of
    each other stay visible: their markers take turns, solid lines are wider and lie lowest, and
    the names of all but the first begin with "=". Whole numbers at the horizontal axis get ticks
    at whole numbers.

    Args:
        axes: Where. On a logarithmic vertical axis, values that are not positive leave a gap, and
            a band ends at a tenth of its line.
        lines: By name.
        within: The range of what is drawn, such as `(0, 1)` of an accuracy; bands end there.
        names: Whether to write the names; if not, they are the labels for a legend.
    """
    from matplotlib.ticker import MaxNLocator

    looks = styles(lines)
    shown = {name: np.asarray(line.y, float) for name, line in lines.items()}
    log = axes.get_yscale() == "log"
    for i, (name, line) in enumerate(lines.items()):
        look, y, x = looks[name], shown[name], np.asarray(line.x)
        if log:
            y = shown[name] = np.where(y > 0, y, np.nan)
        every = min(max(len(lines), len(y) // MARKERS), len(y))
        solid, filled = look.dash == "-", look.marker not in "x+1."
        axes.plot(
            x,
            y,
            label=None if names else name,
            color=look.color,
            linestyle=look.dash,
            linewidth=2.0 if solid else 1.5,
            zorder=2.1 if solid else 2.2,
            marker=look.marker,
            markersize=5,
            markevery=(i * every // len(lines), every),
            markeredgecolor="white" if filled else look.color,
            markeredgewidth=0.5 if filled else 1.2,
        )
        if line.low is not None and line.high is not None:
            low, high = (np.clip(np.asarray(end, float), *within) for end in line[2:])
            if log:
                low = np.maximum(low, y / 10)
            axes.fill_between(x, low, high, color=look.color, alpha=0.13, linewidth=0)
    axes.margins(x=0)
    whole = all(np.issubdtype(np.asarray(line.x).dtype, np.integer) for line in lines.values())
    if whole and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if names:
        same = _coincident(axes, lines, shown)
        ends = []
        for name, first in same.items():
            at = np.flatnonzero(np.isfinite(shown[name]))[-1:]
            x, y = np.asarray(lines[name].x)[at], shown[first][at]
            ends.append((name if name == first else f"= {name}", looks[name].color, x, y))
        label_ends(axes, ends)


def _coincident(
    axes: "Axes", lines: Mapping[str, Line], shown: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """For each name the first line that a reader cannot tell from it, grouped by that line."""
    heights = {}
    axes.get_ylim()  # else the limits are those of before the lines
    for name, y in shown.items():
        points = np.column_stack([np.asarray(lines[name].x, float), y])
        heights[name] = (axes.transData + axes.transAxes.inverted()).transform(points)[:, 1]
    same: dict[str, list[str]] = {}
    for name, height in heights.items():
        for first, group in same.items():
            if not np.isfinite(height).any():  # no line
                continue
            if np.array_equal(lines[first].x, lines[name].x) and np.allclose(
                height, heights[first], rtol=0, atol=APART, equal_nan=True
            ):
                group.append(name)
                break
        else:
            same[name] = [name]
    return {name: first for first, group in same.items() for name in group}
