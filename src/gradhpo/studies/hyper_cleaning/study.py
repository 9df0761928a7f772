"""The run of the study: settings, weights, detection, files."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.core.task import Task
from gradhpo.report import StudyResult, interval, plots, summarize, write_csv
from gradhpo.report.config import Progress, silent
from gradhpo.report.drawing import COLORS, INK, new_axes, new_figure, save
from gradhpo.studies.hyper_cleaning.model import PROBLEM, logits, task
from gradhpo.studies.shared.images import ImageConfig, cost, parts, scorer, tuned

__all__ = ["Config", "Detection", "detection", "run"]

COMPARED = ("one_step", "hyperdistill", "greedy", "reverse")
FASTEST = ("one_step", "greedy")
OUTER = optax.adam(0.1)
POINTS = 20  # of a curve


@dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of the study.

    >>> Config(dataset="mnist").label_noise
    0.5
    """

    out: Path = Path("results/hyper_cleaning")
    train_size: int = 1000
    label_noise: float = 0.5
    episodes: int = 200
    steps: int = 10
    unroll: int = 10
    leaking: bool = False
    """Validate on the test data, as the paper does: accuracies are then optimistic."""


class Detection(NamedTuple):
    """How well small weights point at wrong labels; `f1` takes weights below 1/2 as wrong."""

    f1: float
    auc: float
    weight_clean: float
    weight_wrong: float


def detection(weights: np.ndarray, wrong: np.ndarray) -> Detection:
    """Score weights (n,) as a detector of the wrong labels (n,), bool.

    >>> detection(np.array([0.9, 0.6, 0.4, 0.2]), np.array([False, False, False, True]))[:2]
    (0.6666666666666666, 1.0)
    """
    clean, bad = weights[~wrong], weights[wrong]
    flagged = weights < 0.5
    f1 = 2 * np.sum(flagged & wrong) / max(np.sum(flagged) + np.sum(wrong), 1)
    above = np.mean(clean[:, None] > bad) + 0.5 * np.mean(clean[:, None] == bad)  # ties are half
    return Detection(*(float(x) for x in (f1, above, clean.mean(), bad.mean())))


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `detection.csv`, `accuracy.png` and `weights.png`."""
    start = time.perf_counter()
    if config.fast:
        config = _reduced(config)
    data = datasets.load(config.dataset, config.data_dir)
    own = FASTEST if config.fast else COMPARED
    methods = tuple(dict.fromkeys(("fixed", *(config.method or own))))
    score = scorer(logits)
    values: dict[str, dict[str, list[Any]]] = {m: {} for m in methods}
    weights: dict[str, list[np.ndarray]] = {m: [] for m in methods if m != "fixed"}
    wrong: list[np.ndarray] = []
    for seed in range(config.seeds):
        part = parts(data, config, seed)
        if config.leaking:
            part = part._replace(val=part.test)
        wrong.append(part.wrong)
        for method in methods:
            curve: list[np.ndarray] = []
            params, lam = _train(
                task(seed, part.train, part.val),
                method,
                config,
                lambda params: curve.append(score(params, part.test)),  # noqa: B023
            )
            test, val = curve[-1], score(params, part.val)
            found = {"test_loss": test[0], "test_accuracy": test[1]}
            found |= {"val_loss": val[0], "val_accuracy": val[1]}
            found |= {"test_accuracy_by_epoch": np.array(curve)[:, 1]}
            for metric, value in found.items():
                values[method].setdefault(metric, []).append(value)
            told = f"hyper_cleaning: {config.dataset}, seed {seed}, {method}: test accuracy "
            told += f"{100 * test[1]:.2f} %"
            if method in weights:
                weights[method].append(np.asarray(jax.nn.sigmoid(lam)))
                told += f", AUC {detection(weights[method][-1], part.wrong).auc:.3f}"
            progress(told)
    costs = {m: cost(m, config, config.train_size) for m in methods}
    detections = {
        m: [detection(*pair) for pair in zip(each, wrong, strict=True)]
        for m, each in weights.items()
    }
    _tell(detections, progress)
    files: dict[str, Callable[[Path], object]] = {}
    if weights:
        files["detection.csv"] = lambda path: _write_detection(detections, path)
    files["accuracy.png"] = lambda path: _draw_accuracy(values, config, path)
    if weights:
        files["weights.png"] = lambda path: _draw_weights(weights, np.concatenate(wrong), path)
    return StudyResult(
        "hyper_cleaning" + " (validated on test data)" * config.leaking,
        config,
        summarize(values, costs, baseline="fixed"),
        time.perf_counter() - start,
        data.files,
        files,
    )


_advance = jax.jit(PROBLEM.dynamics.step)


def _reduced(config: Config) -> Config:
    """What ends within a minute on two slow cores."""
    most = {"seeds": 2, "episodes": 30, "train_size": 300, "val_size": 200}
    return replace(config, **{name: min(getattr(config, name), n) for name, n in most.items()})


def _train(task: Task, method: str, config: Config, watch: Callable[[Any], object]) -> Any:
    """`(params, lam)` after all episodes of full-batch training; `watch` sees some params."""
    each = max(1, config.episodes // POINTS)
    if method == "fixed":
        assert callable(task.train)
        params, lam, train = task.params, task.hyperparams, task.train()
        for m in range(1, config.episodes + 1):
            inner = PROBLEM.dynamics.init(params, lam)  # an episode starts with fresh momentum
            for _ in range(config.steps):  # no scan: on CPU convolutions are slow in it
                inner = _advance(inner, lam, train)
            params = inner.params
            if m % each == 0 or m == config.episodes:
                watch(params)
        return params, lam

    def callback(m, state):
        if m % each == 0 or m == config.episodes:
            watch(state.params)

    state = tuned(task, method, config, OUTER, callback)
    return state.params, state.hyperparams


def _tell(detections: dict[str, list[Detection]], progress: Progress) -> None:
    """A line of means with 95 % intervals for each method."""
    for method, rows in detections.items():
        told = []
        for name, column in zip(Detection._fields, np.transpose(rows), strict=True):
            summary = interval(column)
            low, high = summary.ci95
            told.append(f"{name} {summary.mean:.3f} [{low:.3f}, {high:.3f}]")
        progress(f"hyper_cleaning: {method}: {', '.join(told)}")


def _write_detection(detections: dict[str, list[Detection]], path: Path) -> None:
    """A row per method and seed."""
    table = [
        [method, seed, *row] for method, rows in detections.items() for seed, row in enumerate(rows)
    ]
    write_csv(path, ["method", "seed", *Detection._fields], table)


def _draw_accuracy(values: dict[str, dict[str, list[Any]]], config: Config, path: Path) -> None:
    each = max(1, config.episodes // POINTS)
    plots.curves(
        {m: np.array(metrics["test_accuracy_by_epoch"]) for m, metrics in values.items()},
        path,
        f"training steps / {each * config.steps}",
        "test accuracy",
        f"{config.dataset}, {100 * config.label_noise:g} % of the labels replaced",
        band=config.seeds > 2,
    )


def _draw_weights(weights: dict[str, list[np.ndarray]], wrong: np.ndarray, path: Path) -> None:
    """A panel per method: how the weights of all seeds' examples are spread."""
    figure = new_figure(1 + 2.3 * len(weights), 2.9)
    panels = figure.subfigures(1, len(weights), squeeze=False).ravel()
    bins = np.linspace(0, 1, 21)
    for i, (panel, (method, each)) in enumerate(zip(panels, weights.items(), strict=True)):
        axes = new_axes(panel, method, "weight", "" if i else "examples")
        pooled = np.concatenate(each)
        for name, color, chosen in (("right", COLORS[0], ~wrong), ("wrong", COLORS[1], wrong)):
            axes.hist(pooled[chosen], bins.tolist(), color=color, alpha=0.6, label=f"{name} label")
        if not i:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)
