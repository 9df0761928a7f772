"""The table and the figures of the curves."""

from pathlib import Path

import numpy as np

from gradhpo.report import interval, write_csv
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.studies.single_loop.entries import cost
from gradhpo.studies.single_loop.training import Curve

__all__ = ["draw", "write"]


def write(curves: dict[str, list[Curve]], budget: int, path: Path) -> None:
    """A row per method, seed and point."""
    table = []
    for method, each in curves.items():
        for seed, curve in enumerate(each):
            points = len(curve.value) - 1
            total = np.array(cost(method, budget, points))
            for k, row in enumerate(zip(*curve[:4], strict=True)):
                table.append([method, seed, *(total * k // points).tolist(), *map(float, row)])
    fields = ("seconds", "hypergrad_norm", "value", "current")
    write_csv(path, ["method", "seed", "gradients", "products", *fields], table)


def draw(
    curves: dict[str, list[Curve]], field: str, budget: int, title: str, path: Path, label: str
) -> None:
    """Mean over seeds with its 95 % interval, against the budget and against the clock."""
    figure = new_figure(10.4, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False).ravel()
    for panel, xlabel, heading in (
        (left, "thousand gradient evaluations (a product counts as 2)", title),
        (right, "seconds, without compilation", ""),
    ):
        axes = new_axes(panel, heading, xlabel, label)
        axes.set_yscale("log", nonpositive="mask")
        lines = {}
        for method, each in curves.items():
            summary = interval(np.array([getattr(curve, field) for curve in each]))
            x = np.linspace(0, budget / 1000, summary.mean.size)
            if panel is right:
                x = np.mean([curve.seconds for curve in each], axis=0)
            lines[method] = Line(x, summary.mean, *(summary.ci95 if len(each) > 2 else ()))
        draw_lines(axes, lines)
    save(figure, path)
