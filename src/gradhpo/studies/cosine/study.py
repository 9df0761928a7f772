"""The run of the study `cosine`: checkpoints, table, figure."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gradhpo.report import MethodResult, StudyResult, interval, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.studies.cosine.methods import METHODS, Agreement, cost, measure
from gradhpo.studies.cosine.problems import Family, characters, sinusoids
from gradhpo.studies.cosine.published import INDIRECT, WHOLE

__all__ = ["Config", "run"]

FAMILIES = ("sinusoid", "characters")
BANDS = ("one_step", "hyperdistill", "drmad, full")  # of which the figure shows the intervals

Curves = dict[str, Agreement]
"""By method, arrays (runs x tasks, checkpoints)."""


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config(seeds=1).checkpoints
    6
    """

    out: Path = Path("results/cosine")
    family: Literal["sinusoid", "characters", "both"] = "both"
    """Whose tasks."""
    seeds: int = 3
    """Meta-training runs."""
    tasks: int = 40
    """Tasks that every checkpoint of a run is measured on; of characters a quarter of them."""
    checkpoints: int = 6
    """Of a run; the first is its start."""
    every: int = 6
    """Meta-batches between two checkpoints."""
    channels: int = 8
    """Of the network for characters."""
    data_dir: Path | None = None
    """Directory that holds Omniglot; by default the cache, filled by a download."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tasks=4, checkpoints=2, every=1, channels=1)

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return METHODS


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `cosine.csv` and `cosine.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(
            config,
            family="sinusoid",
            seeds=1,
            tasks=min(config.tasks, 20),
            checkpoints=min(config.checkpoints, 3),
        )
    at = [config.every * i for i in range(config.checkpoints)]
    found, methods, data = {}, {}, {}
    for name in FAMILIES if config.family == "both" else (config.family,):
        if name == "sinusoid":
            family, number = sinusoids(), config.tasks
        else:
            (family, data), number = characters(config.channels, config.data_dir), config.tasks // 4
        curves = _along(family, config, at, number, progress)
        curves = {m: curves[m] for m in METHODS if not config.method or m in config.method}
        methods |= _summarized(family, curves)
        found[name] = curves
        progress(f"cosine: {name}: {_told(curves)}")
    files = {
        "table.csv": lambda path: _write_table(found, at, path),
        "cosine.csv": lambda path: _write_all(found, at, config.seeds, path),
        "cosine.png": lambda path: _draw(found, at, path),
    }
    seconds = time.perf_counter() - begun
    return StudyResult("cosine", config, methods, seconds, data, files)


def _along(
    family: Family, config: Config, at: list[int], number: int, progress: Progress
) -> Curves:
    """All methods at all checkpoints of all runs; every checkpoint of a run sees the same tasks."""
    runs = []
    for seed in range(config.seeds):
        window = family.draw(jax.random.key(1_000_000 + seed), number)
        points, run = [], f"{family.name}, run {seed}"
        for m, params, lam in once(f"{run}, meta-training", family.meta_train, seed, at):
            how = family, params, lam, window
            points.append(once(f"{run}, {m}", measure, *how, types=(Agreement,)))
            near = ", ".join(
                f"{name} {points[-1][name].whole.mean():.3f}"
                for name in ("fo", "one_step", "hyperdistill", "drmad")
            )
            progress(f"cosine: {family.name}, run {seed}, after {m} meta-batches: {near}")
        runs.append(jax.tree.map(lambda *x: np.stack(x, axis=-1), *points))
    return jax.tree.map(lambda *x: np.concatenate(x), *runs)


def _told(curves: Curves) -> str:
    ordered = [curves[m].whole.mean(0) for m in ("fo", "one_step", "hyperdistill") if m in curves]
    if len(ordered) < 3:
        return "done"
    fo, one_step, distilled = ordered
    right = int(np.sum((distilled > one_step) & (one_step > fo)))
    return f"HyperDistill above one step above fo at {right} of {len(fo)} checkpoints"


def _summarized(family: Family, curves: Curves) -> dict[str, MethodResult]:
    """Each method, and its indirect term, against one step; `cosine` is the mean of a task over
    the checkpoints. Costs are those of one hypergradient."""
    values: dict[str, dict[str, Any]] = {}
    costs = {}
    size = sum(x.size for x in jax.tree.leaves(family.start(0)[1]))
    for method, found in curves.items():
        for text, array in (("", found.whole), (", indirect term", found.indirect)):
            if method == "fo" and text:
                continue  # it has none
            name = f"{family.name}: {method}{text}"
            values[name] = {"cosine": array.mean(1), "cosine_by_epoch": array}
            costs[name] = cost(method, family.steps, family.rate, size)
        values[f"{family.name}: {method}"]["norm_ratio"] = found.ratio.mean(1)
    results = {}
    for text in ("", ", indirect term"):
        part = {
            name: x for name, x in values.items() if name.endswith("indirect term") == bool(text)
        }
        baseline = f"{family.name}: one_step{text}"
        spent = {name: costs[name] for name in part}
        results |= summarize(part, spent, baseline if baseline in part else None)
    return results


def _write_table(found: Mapping[str, Curves], at: list[int], path: Path) -> None:
    """A row per family, method and checkpoint: means over tasks with half intervals."""
    table = []
    for family, curves in found.items():
        for method, each in curves.items():
            columns = [_means(array) for array in (*each, each.whole - _base(curves, each).whole)]
            for k, m in enumerate(at):
                numbers = [float(x[k]) for pair in columns for x in pair]
                known = ["", ""]
                if family == "characters" and k == len(at) - 1:
                    known = [WHOLE.get(method, ""), INDIRECT.get(method, "")]
                table.append([family, method, m, *numbers, *known])
    names = ("whole", "indirect", "norm_ratio", "whole_minus_one_step")
    header = [text for name in names for text in (name, f"{name}_half")]
    header += ["published_whole", "published_indirect"]
    write_csv(path, ["family", "method", "meta-batches", *header], table)


def _base(curves: Curves, otherwise: Agreement) -> Agreement:
    return curves.get("one_step", otherwise)


def _means(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    summary = interval(array)
    return summary.mean, (summary.ci95[1] - summary.ci95[0]) / 2


def _write_all(found: Mapping[str, Curves], at: list[int], seeds: int, path: Path) -> None:
    """A row per family, method, run, task and checkpoint."""
    table = [
        [family, method, i // (len(each.whole) // seeds), i % (len(each.whole) // seeds), at[k]]
        + [array[i, k] for array in each]
        for family, curves in found.items()
        for method, each in curves.items()
        for i, k in np.ndindex(each.whole.shape)
    ]
    header = ["family", "method", "run", "task", "meta-batches", *Agreement._fields]
    write_csv(path, header, table)


def _draw(found: Mapping[str, Curves], at: list[int], path: Path) -> Path:
    """A row of two panels for each family: the whole, and the indirect terms."""
    figure = new_figure(13.4, 4.4 * len(found))
    rows = figure.subfigures(len(found), 1, squeeze=False).ravel()
    for row, (family, curves) in zip(rows, found.items(), strict=True):
        panels = row.subfigures(1, 2, squeeze=False).ravel()
        number = len(next(iter(curves.values())).whole)
        for i, panel in enumerate(panels):
            title = f"{family}, mean over {number} tasks" if not i else " "
            label = ("cosine", "cosine of the indirect terms")[i]
            axes = new_axes(panel, title, "meta-batches", f"{label} to the exact one")
            lines = {}
            for method, each in curves.items():
                mean, half = _means(each[i])
                if np.isfinite(mean).any():
                    band = (mean - half, mean + half) if method in BANDS else ()
                    lines[method] = Line(at, mean, *band)
            draw_lines(axes, lines, within=(-1, 1))
    return save(figure, path)
