"""The figure of a check: for each method a row with its cosine to the truth, and its cost."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.utils._styles import FAINT, INK, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradhpo.diagnostics.rows import HypergradientCheck, Row

__all__ = ["draw_rows", "plot_check"]


def plot_check(check: "HypergradientCheck", path: str | Path) -> Path:
    """The file of `HypergradientCheck.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need Matplotlib: pip install ".[plot]"') from error
    figure = Figure(figsize=(6.0, 1.3 + 0.24 * len(check.rows)), layout="constrained")
    axes = figure.add_subplot()
    draw_rows(check.rows, axes)
    axes.set_title(f"Hypergradient of {check.steps} steps", loc="left", fontsize=11, pad=18)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(file, dpi=160, facecolor="white")
    return file


def draw_rows(rows: Mapping[str, "Row"], axes: "Axes") -> None:
    """A row per method, the first on top: its mark at the cosine, the arithmetic on the right.

    A method without a cosine has a word in place of the mark.
    """
    # Even steps are even angles: the cosine itself hardly differs between small angles.
    axes.set_xscale("function", functions=(lambda c: -np.arccos(np.clip(c, -1, 1)), np.cos))
    cosines = [row.cosine for row in rows.values() if math.isfinite(row.cosine)]
    lowest = max(-1.0, min([0.5, *cosines]) - 0.2)
    axes.set_xlim(lowest, 1)
    below = -0.9 if lowest < -0.9 else -0.5  # both would touch
    ticks = [c for c in (1, 0.9, 0.5, 0, below) if c >= lowest]
    axes.set_xticks(ticks, [f"{c:g}" for c in ticks])
    beside = axes.get_yaxis_transform()  # x in parts of the axes, y in rows

    def cost(text: str, height: float) -> None:
        place = {"xycoords": beside, "xytext": (34, 0), "textcoords": "offset points"}
        look = {"color": INK, "fontsize": 8, "ha": "right", "va": "center"}
        axes.annotate(text, (1, height), **place, **look)

    for i, (name, look) in enumerate(styles(rows).items()):
        row = rows[name]
        if math.isfinite(row.cosine):
            mark = {"color": look.color, "marker": look.marker, "markersize": 7, "zorder": 3}
            axes.plot(row.cosine, i, clip_on=False, **mark)
        else:
            said = {"transform": beside, "color": "#777777", "fontsize": 8, "va": "center"}
            over_grid = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(0.04, i, _without(row), bbox=over_grid, **said)
        if math.isfinite(row.flops):
            cost(f"{row.flops:.{1 if row.flops < 10 else 0}f}", i)
    cost("cost", -1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("cosine", color=INK)
    axes.grid(color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _without(row: "Row") -> str:
    if row.refused:
        return "refuses"
    return "zero" if row.norm_ratio == 0 else row.status.name.lower().replace("_", " ")
