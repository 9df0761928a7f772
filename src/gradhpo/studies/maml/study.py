"""The run of the study `maml`: settings, the comparison with the published errors, files."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from gradhpo.report import MethodResult, StudyResult, interval, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import INK, new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.studies.maml.published import PUBLISHED, Published
from gradhpo.studies.maml.training import ENTRIES, STEPS, advance, draw, errors, initial

__all__ = ["Config", "run"]

QUERIES = 100  # points that judge a test task
PART = 1000  # meta-steps in one call of a program

Errors = dict[tuple[str, int], np.ndarray]
"""Method and shots to (seeds, STEPS + 1)."""


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config(tasks=4).shots
    (5, 10, 20)
    """

    out: Path = Path("results/maml")
    seeds: int = 3
    shots: tuple[int, ...] = (5, 10, 20)
    """Points of a task that are trained on, and as many that validate."""
    tasks: int = 25
    """Tasks of a meta-step; Li et al. have 4."""
    meta_steps: int = 20_000
    """Updates of the initial weights, rounded up to thousands from one thousand on."""
    tests: int = 1000
    """Test tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tasks=1, meta_steps=1, tests=1)
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots must be numbers of points, at least 1, not {self.shots}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(ENTRIES)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study.

    Its metrics are the error after one gradient step, and by "epoch" that after 1 to 10. Its files
    are `errors.csv`, `published.csv` and `errors.png`.
    """
    begun = time.perf_counter()
    if config.fast:
        config = replace(
            config, shots=config.shots[:2], meta_steps=min(config.meta_steps, 2000), tests=200
        )
    methods = config.method or tuple(ENTRIES)
    found: Errors = {}
    for shots in config.shots:
        for method in methods:
            part = f"{shots} points, {method}"
            found[method, shots] = once(part, _errors, method, shots, config)
            after = found[method, shots].mean(axis=0)
            progress(
                f"maml: {shots} points, {method}: error {after[0]:.3f} before, {after[1]:.3f} "
                f"after 1 step, {after[STEPS]:.3f} after {STEPS}"
            )
    beside = [(row, found[row[1:3]][:, row.steps]) for row in PUBLISHED if row[1:3] in found]
    for row, ours in beside:
        progress(
            f"maml: {row.shots} points, {row.method}, {row.steps} step{'s' * (row.steps > 1)}: "
            f"{ours.mean():.3f}, published {_with_half(row)} ({row.source})"
        )
    files: dict[str, Callable[[Path], object]] = {
        "errors.csv": lambda path: _write_errors(found, path),
        "published.csv": lambda path: _write_published(beside, path),
        "errors.png": lambda path: _draw(found, config, path),
    }
    return StudyResult(
        "maml", config, _summaries(found, config), time.perf_counter() - begun, files=files
    )


def _errors(method: str, shots: int, config: Config) -> np.ndarray:
    """Meta-training and test; every seed has meta-batches of its own, the tests are the same."""
    states = initial(method, config.seeds, config.tasks)
    steps = min(PART, config.meta_steps)
    shape = config.seeds, steps, config.tasks
    for part in range(-(-config.meta_steps // steps)):
        states = advance(method, states, draw(shots, shots, shape, jax.random.key(part)))
    tests = draw(shots, QUERIES, (config.tests,), jax.random.key(1_000_000))
    return np.asarray(errors(method, states, tests), np.float64)


def _summaries(found: Errors, config: Config) -> dict[str, MethodResult]:
    """Rows such as `maml 5`; differences are to the first method with as many points."""
    steps = min(PART, config.meta_steps) * -(-config.meta_steps // PART)
    rows: dict[str, MethodResult] = {}
    for shots in config.shots:
        values = {
            f"{method} {shots}": {"test_mse": each[:, 1], "test_mse_by_epoch": each[:, 1:]}
            for (method, points), each in found.items()
            if points == shots
        }
        costs = {}
        for name in values:
            estimator = ENTRIES[name.split()[0]].estimator
            window = estimator.unroll_steps + (estimator.lead or 0)
            costs[name] = estimator.cost(window, 1, episodes=steps * config.tasks)
        rows |= summarize(values, costs, baseline=next(iter(values)))
    return rows


def _with_half(row: Published) -> str:
    return f"{row.mse:g}" if row.half is None else f"{row.mse:g} +- {row.half:g}"


def _write_errors(found: Errors, path: Path) -> None:
    """A row per method, points, seed and number of gradient steps."""
    table = [
        [method, shots, seed, step, value]
        for (method, shots), each in found.items()
        for (seed, step), value in np.ndenumerate(each)
    ]
    write_csv(path, ["method", "shots", "seed", "steps", "test_mse"], table)


def _write_published(beside: list[tuple[Published, np.ndarray]], path: Path) -> None:
    """Ours, mean and 95 % interval over seeds, beside each published number."""
    table = []
    for row, ours in beside:
        summary = interval(ours)
        table.append([*row, summary.mean, *summary.ci95])
    header = ["source", "method", "shots", "steps", "published", "half", "mean", "low", "high"]
    write_csv(path, header, table)


def _draw(found: Mapping[tuple[str, int], np.ndarray], config: Config, path: Path) -> None:
    """A panel for each number of points: errors over gradient steps."""
    figure = new_figure(1 + 3.6 * len(config.shots), 3.6)
    panels = figure.subfigures(1, len(config.shots), squeeze=False).ravel()
    for i, (panel, shots) in enumerate(zip(panels, config.shots, strict=True)):
        label = "" if i else "mean squared error"
        axes = new_axes(panel, f"{shots} points", "gradient steps on a new task", label)
        lines: dict[str, Line] = {}
        each = {m: values for (m, points), values in found.items() if points == shots}
        for method, (color, _, _) in styles(each).items():
            summary, x = interval(each[method]), np.arange(STEPS + 1)
            lines[method] = Line(x, summary.mean, *(summary.ci95 if len(each[method]) > 2 else ()))
            for row in PUBLISHED:
                if (row.method, row.shots) == (method, shots):
                    half = [[row.half or 0.0]]
                    axes.errorbar([row.steps], [row.mse], half, fmt="x", color=color, markersize=5)
        axes.plot([], [], "x", color=INK, label="published")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        axes.update_datalim([(0, 0)])  # the limits are found with the lines, and reach down to 0
        draw_lines(axes, lines)
    save(figure, path)
