"""Figures of a study, drawn with Matplotlib objects.

`pyplot` and the global backend are left alone, so these run on a machine without a screen, in
threads, and in a notebook without changing it. Every function returns the path it wrote; the
suffix of the path (.png, .svg, .pdf) is the format. All raise ImportError, with the command to
run, where Matplotlib is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from gradhpo.report.drawing import FAINT, INK, new_axes, new_figure, save, styles
from gradhpo.report.intervals import interval
from gradhpo.report.lines import Line, draw_lines

__all__ = ["before_after", "curves", "images"]


def curves(
    curves_by_method: Mapping[str, ArrayLike],
    path: str | Path,
    xlabel: str,
    ylabel: str,
    title: str,
    log_y: bool = False,
    band: bool = True,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Path:
    """One line per method, the mean over seeds with its 95 % band, named at its right end.

    The looks are those of `draw_lines`.

    Args:
        curves_by_method: Arrays of shape `(seeds, epochs)`; the first epoch is drawn at 1.
        path: File to write; parents are created.
        xlabel: Name of the horizontal axis.
        ylabel: Name of the vertical axis.
        title: Stands above the figure.
        log_y: Logarithmic vertical axis; values that are not positive leave a gap.
        band: Whether to draw the intervals.
        within: The values that there can be, `(0, 1)` of an accuracy; intervals end there.

    Raises:
        ValueError: no method, or an array of another shape.

    >>> import tempfile
    >>> losses = {"fixed": [[3.0, 2.0], [3.5, 2.2]], "t1t2": [[3.0, 1.0], [3.5, 1.3]]}
    >>> file = curves(losses, tempfile.mkdtemp() + "/a.png", "epoch", "loss", "Losses")
    >>> file.stat().st_size > 5000
    True
    """
    if not curves_by_method:
        raise ValueError("there is no curve to draw.")
    figure = new_figure(6.4, 4.0)
    axes = new_axes(figure, title, xlabel, ylabel)
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
    lines = {}
    for name, values in curves_by_method.items():
        summary = interval(values)
        if summary.seeds.ndim != 2:
            raise ValueError(
                f"curve {name!r} has shape {summary.seeds.shape}, not (seeds, epochs)."
            )
        x = np.arange(1, len(summary.mean) + 1)
        lines[name] = Line(x, summary.mean, *(summary.ci95 if band else ()))
    draw_lines(axes, lines, within=within)
    return save(figure, path)


def before_after(
    values_by_method: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | Path,
    ylabel: str,
    title: str,
    labels: tuple[str, str] = ("before", "after"),
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Path:
    """For each method two dots, mean with 95 % interval, and a thin line for each seed.

    Args:
        values_by_method: Pairs of arrays of shape `(seeds,)`, entry i of both from one seed.
        path: File to write; parents are created.
        ylabel: Name of the vertical axis.
        title: Stands above the figure.
        labels: What the open and the filled dot mean.
        within: As for `curves`.

    Raises:
        ValueError: no method, or a pair of arrays of other or different shapes.

    >>> import tempfile
    >>> pairs = {"t1t2": ([0.80, 0.82], [0.90, 0.91])}
    >>> before_after(pairs, tempfile.mkdtemp() + "/b.png", "accuracy", "Cleaning").name
    'b.png'
    """
    if not values_by_method:
        raise ValueError("there is no method to draw.")
    figure = new_figure(1.6 + 1.1 * max(3, len(values_by_method)), 3.6)
    axes = new_axes(figure, title, "", ylabel, pad=24)  # room for the legend
    looks = styles(values_by_method)
    for i, (name, pair) in enumerate(values_by_method.items()):
        summaries = [interval(values) for values in pair]
        shapes = [summary.seeds.shape for summary in summaries]
        if shapes[0] != shapes[1] or len(shapes[0]) != 1:
            raise ValueError(f"{name!r} has arrays of shapes {shapes}, not twice (seeds,).")
        x, (color, _, marker) = (i - 0.16, i + 0.16), looks[name]
        axes.plot(x, [s.seeds for s in summaries], color=FAINT, linewidth=0.8, zorder=1)
        for at, summary, face in zip(x, summaries, ("white", color), strict=True):
            axes.vlines(at, *summary.ci95.clip(*within), color=color, linewidth=1.6)
            axes.plot(at, summary.mean, marker, color=color, markerfacecolor=face, markersize=7)
    for label, face in zip(labels, ("white", INK), strict=True):
        axes.plot([], [], "o", color=INK, markerfacecolor=face, label=label)
    axes.legend(
        frameon=False,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderpad=0,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0,
        columnspacing=1,
    )
    axes.set_xticks(range(len(values_by_method)), list(values_by_method))
    axes.set_xlim(-0.5, len(values_by_method) - 0.5)
    axes.tick_params(axis="x", length=0)
    return save(figure, path)


def images(grid: ArrayLike, path: str | Path, titles: Sequence[str] = ()) -> Path:
    """A grid of images without axes.

    Args:
        grid: Shape `(rows, columns, height, width)` for grey, black at the grid's smallest
            value and white at its largest, or `(rows, columns, height, width, 3)` for colour:
            floats in [0, 1] or integers up to 255.
        path: File to write; parents are created.
        titles: One per image, row by row, `""` for none; or empty.

    Raises:
        ValueError: `grid` has another shape, or `titles` another length.

    >>> import tempfile
    >>> images(np.eye(8).reshape(1, 1, 8, 8), tempfile.mkdtemp() + "/c.png", ["eye"]).name
    'c.png'
    """
    pixels = np.asarray(grid)
    if pixels.ndim not in (4, 5) or not pixels.size or pixels.shape[4:] not in ((), (3,)):
        raise ValueError(f"grid has shape {pixels.shape}, not (rows, columns, height, width[, 3]).")
    rows, columns, height, width = pixels.shape[:4]
    if len(titles) not in (0, rows * columns):
        raise ValueError(f"{len(titles)} titles for {rows * columns} images.")
    tall = height / width + (0.25 if any(titles) else 0.04)
    figure = new_figure(1.1 * columns, 1.1 * rows * tall)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    flat = pixels.reshape(rows * columns, *pixels.shape[2:])
    for i, axes in enumerate(panels):
        axes.imshow(flat[i], cmap="gray", vmin=pixels.min(), vmax=pixels.max())
        axes.set_axis_off()
        if titles:
            axes.set_title(titles[i], fontsize=8, color=INK, pad=2)
    return save(figure, path)
