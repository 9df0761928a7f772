"""The run of the study `omniglot`: settings, trials, the published table beside ours, files."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gradhpo import datasets
from gradhpo.core.problem import Window
from gradhpo.meta.images import FewShot, split_classes
from gradhpo.report import MethodResult, StudyResult, plots, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.omniglot.published import ACCURACY
from gradhpo.studies.omniglot.training import METHODS, STEPS, Learner, draw

__all__ = ["Config", "pixels_of", "run"]

SHARES = (0.8, 0.2)  # of the characters: to train, and for the tasks that are reported
QUERIES = 10  # images of a character that validate
FASTEST = ("one_step", "greedy")

Values = dict[str, dict[str, list[Any]]]
"""`values[method][metric]`, an entry per seed."""


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study; `seeds` are the paper's trials.

    Raises:
        ValueError: a number is out of range.

    >>> Config(ways=(5,)).shots
    1
    """

    out: Path = Path("results/omniglot")
    dataset: Literal["omniglot"] = "omniglot"
    """Data set; found in the data directory or downloaded."""
    seeds: int = 3
    ways: tuple[int, ...] = (5, 10)
    """Characters of a task; the paper has 2, 3, 5 and 10."""
    shots: int = 1
    """Images of each to train on."""
    updates: int = 2000
    """Updates of the shared layers, each by one task."""
    carry: float = 0.0
    """Where the next task starts: 0 from the same random weights, 1 where this one has ended."""
    tests: int = 400
    """Test tasks."""
    points: int = 10
    """Points of the curves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(shots=1, updates=1, tests=1, points=1)
        if not self.ways or min(self.ways) < 2:
            raise ValueError(f"ways must be numbers of characters, at least 2, not {self.ways}.")
        if self.updates % self.points:
            raise ValueError(f"points must divide the {self.updates} updates, not {self.points}.")
        if not 0 <= self.carry <= 1:
            raise ValueError(f"carry must be between 0 and 1, not {self.carry}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `published.csv` and a figure for each number of ways.

    A row is a method and a number of ways; `fixed` are the layers as they are at the start.
    """
    begun = time.perf_counter()
    methods = config.method or tuple(METHODS)
    if config.fast:
        most = {"seeds": 2, "updates": 100, "tests": 50, "points": 4}
        fewer = {name: min(getattr(config, name), n) for name, n in most.items()}
        config = replace(config, ways=config.ways[:1], **fewer)
        methods = config.method or FASTEST
    data = datasets.load(config.dataset, config.data_dir)
    images, labels = pixels_of(data)
    rows: dict[str, MethodResult] = {}
    table: list[list[Any]] = []
    files: dict[str, Callable[[Path], object]] = {
        "published.csv": lambda path: write_csv(path, HEADER, table)
    }
    for ways in config.ways:
        name = f"{ways}-way {config.shots}-shot"
        values = _trials(Learner(images, ways), labels, methods, config, progress)
        costs = {m: METHODS[m].cost(STEPS, 1, episodes=config.updates) for m in methods}
        baseline = "greedy" if "greedy" in methods else methods[0]
        found = summarize(values, costs, baseline=baseline)
        table += _beside_published(found, ways, config.shots)
        for row in table[-len(found) :]:
            progress(f"omniglot: {name}, " + _told(row))
        rows |= {f"{method} {ways}": _renamed(row, ways) for method, row in found.items()}
        files[f"accuracy_{ways}.png"] = partial(_draw, values, f"Omniglot, {name}", config)
    seconds = time.perf_counter() - begun
    return StudyResult("omniglot", config, rows, seconds, data.files, files)


def pixels_of(data: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, side, side, 1) and the character of each, from both parts of the data set."""
    parts = [part.inputs for part in (data.train, data.test) if part is not None]
    drawn = np.round(255 * np.concatenate(parts)).astype(np.uint8)
    characters, drawers, *sides = drawn.shape
    return drawn.reshape(-1, *sides, 1), np.repeat(np.arange(characters), drawers)


def _trials(
    learner: Learner,
    labels: np.ndarray,
    methods: tuple[str, ...],
    config: Config,
    progress: Progress,
) -> Values:
    """Every method on every seed, which decides on the characters, the tasks and the start."""
    ways = learner.model.ways
    values: Values = {method: {} for method in ("fixed", *methods)}
    for seed in range(config.seeds):
        train, test = (
            draw(FewShot(labels, ways, config.shots, QUERIES, STEPS, classes.tolist()), seed, count)
            for classes, count in zip(
                split_classes(labels, SHARES, seed), (config.updates, config.tests), strict=True
            )
        )
        few = jax.tree.map(lambda x: x[: max(1, config.tests // 4)], test)  # for the curves
        for method, row in values.items():
            told, how = time.perf_counter(), (learner, method, seed, train, few, test, config)
            found, note = once(f"{ways} ways, seed {seed}, {method}", _trial, *how)
            for metric, value in found.items():
                row.setdefault(metric, []).append(value)
            progress(
                f"omniglot: {ways}-way {config.shots}-shot, seed {seed}, {method}: test accuracy "
                f"{100 * found['test_accuracy']:.2f} %{note}, {time.perf_counter() - told:.0f} s"
            )
    return values


def _trial(
    learner: Learner,
    method: str,
    seed: int,
    train: Window,
    few: Window,
    test: Window,
    config: Config,
) -> tuple[dict[str, Any], str]:
    """The metrics of a method on a seed, and a remark."""
    found, note, at = {}, "", learner.start(seed)
    if method != "fixed":
        states = learner.train(method, seed, train, config.points, config.carry)
        reached = [(state.params, state.hyperparams) for state in states]
        curve = [learner.test(*point, few).accuracy.mean() for point in reached]
        found["test_accuracy_by_epoch"] = curve
        at, rejected = reached[-1], int(states[-1].metadata["n_rejected"])
        note = f", {rejected} updates rejected" if rejected else ""
    score = learner.test(*at, test)
    return found | {"test_loss": score.loss.mean(), "test_accuracy": score.accuracy.mean()}, note


HEADER = ["method", "ways", "accuracy", "low", "high", "published", "half", "products"]


def _beside_published(found: Mapping[str, MethodResult], ways: int, shots: int) -> list[list[Any]]:
    """Rows under `HEADER`, in per cent, with the products of one update."""
    rows = []
    for method, result in found.items():
        summary = result.metrics["test_accuracy"]
        theirs = ACCURACY.get(method, {}).get(ways) if shots == 1 else None
        products = METHODS[method].cost(STEPS, 1).products if method in METHODS else 0
        ours = 100 * np.array([summary.mean, *summary.ci95])
        rows.append([method, ways, *ours, *(theirs or ("", "")), products])
    return rows


def _told(row: list[Any]) -> str:
    method, _, mean, low, high, published, half, _ = row
    line = f"{method}: {mean:.2f} %" + f" [{low:.2f}, {high:.2f}]" * bool(np.isfinite(low))
    return line + (f", published {published:.2f} +- {half:.2f}" if published else "")


def _renamed(row: MethodResult, ways: int) -> MethodResult:
    """Compared with the row of as many ways."""
    differences = {
        metric: replace(difference, to=f"{difference.to} {ways}")
        for metric, difference in row.paired_difference.items()
    }
    return replace(row, paired_difference=differences)


def _draw(values: Values, title: str, config: Config, path: Path) -> None:
    plots.curves(
        {
            method: np.array(metrics["test_accuracy_by_epoch"])
            for method, metrics in values.items()
            if "test_accuracy_by_epoch" in metrics
        },
        path,
        f"updates / {config.updates / config.points:g}",
        "accuracy on tasks of new characters",
        title,
        band=config.seeds > 2,
        within=(0, 1),
    )
