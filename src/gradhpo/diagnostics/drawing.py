"""The figure of a check: cosine to the exact hypergradient against cost."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.diagnostics.methods import known_methods
from gradhpo.utils._palette import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradhpo.diagnostics.rows import HypergradientCheck, Row

__all__ = ["draw_rows", "plot_check"]

MARKERS = "osD^v<>PX*ph"


def plot_check(check: "HypergradientCheck", path: str | Path) -> Path:
    """The file of `HypergradientCheck.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need Matplotlib: pip install ".[plot]"') from error
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    draw_rows(check.rows, axes)
    axes.set_title(f"Hypergradient of {check.steps} steps", loc="left", fontsize=11, pad=12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(file, dpi=160, facecolor="white")
    return file


def draw_rows(rows: Mapping[str, "Row"], axes: "Axes") -> None:
    """One labelled point per method; the place of a name among the known ones decides its look."""
    known = known_methods()
    order = [*known, *(name for name in rows if name not in known)]
    shown = {n: row for n, row in rows.items() if math.isfinite(row.cosine)}
    for name, row in shown.items():
        i = order.index(name)
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        style = {"color": color, "marker": marker, "edgecolor": "white", "linewidth": 0.6}
        axes.scatter(row.flops, row.cosine, s=64, label=name, clip_on=False, **style)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_xlim(0.9, 1.2 * max([10, *(row.flops for row in shown.values())]))
    # Even steps are even angles: the cosine itself hardly differs between small angles.
    axes.set_yscale("function", functions=(lambda c: -np.arccos(np.clip(c, -1, 1)), np.cos))
    lowest = max(-1.0, min([0.0, *(row.cosine for row in shown.values())]) - 0.2)
    axes.set_ylim(lowest, 1)
    ticks = [c for c in (1, 0.99, 0.95, 0.8, 0.5, 0, -0.5, -0.9, -1) if c >= lowest]
    axes.set_yticks(ticks, [f"{c:g}" for c in ticks])
    axes.grid(axis="y", color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("arithmetic, in units of training alone")
    axes.set_ylabel("cosine to the exact hypergradient")
    axes.spines[["top", "right"]].set_visible(False)
