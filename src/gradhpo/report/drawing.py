"""The look of our figures: bare axes, names at the ends of lines, files without pyplot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.utils._styles import COLORS, FAINT, INK, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "FAINT",
    "INK",
    "label_ends",
    "new_axes",
    "new_figure",
    "require_matplotlib",
    "save",
    "styles",
]

LineEnd = tuple[str, str, np.ndarray, np.ndarray]
"""Name, colour, and x and y of a line's last point: shape (1,), or (0,) if it has none."""


def require_matplotlib() -> None:
    """Import what draws and writes figures; the ImportError has the command to run.

    Called before a long study, so that its end does not bring up what was there from the start.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('Figures need Matplotlib: pip install ".[plot]"') from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, whose layout makes room for what stands beside the axes."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_axes(
    figure: "Figure", title: str, xlabel: str, ylabel: str, *, pad: float = 10, size: float = 11
) -> "Axes":
    """Axes without the box, with a faint horizontal grid and the title, letters of `size` points,
    `pad` points above."""
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=size, pad=pad)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def label_ends(axes: "Axes", ends: Sequence[LineEnd]) -> None:
    """Write each name beside the end of its line, moved where two names would touch.

    Of lines that end at one height the first has its name on top.
    """
    gap = 0.065  # of the axes' height: one line of text
    (_, right), (_, top) = axes.get_xlim(), axes.get_ylim()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = []
    for i, (name, color, x, y) in enumerate(ends):
        point = (float(x[0]), float(y[0])) if len(x) else (right, top)
        places.append((float(to_axes.transform(point)[1]), -i, name, color, point, len(x) > 0))
    places.sort()
    heights = np.array([place[0] for place in places])
    for _ in range(200):  # neighbours that touch push each other apart
        push = np.maximum(gap - np.diff(heights), 0.0) / 2
        heights[:-1] -= push
        heights[1:] += push
    for height, (_, _, name, color, point, visible) in zip(heights, places, strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(
            name if visible else f"{name} (diverged)",
            xy=point,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops=leader if visible else None,
        )


def save(figure: "Figure", path: str | Path) -> Path:
    """Write the figure in the format of the path's suffix; parents are created."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(file, dpi=160, facecolor="white")
    return file
