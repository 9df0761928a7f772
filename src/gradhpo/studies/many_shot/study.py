"""The run of the study: meta-training by every method, curves, tests, files."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.core.estimator import Cost
from gradhpo.core.state import BilevelState
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.meta.images import ManyShot
from gradhpo.report import StudyResult, interval, paired, plots, summarize, write_csv
from gradhpo.report.config import Progress, silent
from gradhpo.report.intervals import Summary
from gradhpo.report.parts import once
from gradhpo.studies.many_shot.published import products, reported
from gradhpo.studies.many_shot.setting import Config, samples
from gradhpo.studies.many_shot.training import Learner, Run, Score
from gradhpo.studies.shared.meta_learning import (
    FIT_PERIOD,
    META_METHODS,
    Schedule,
    meta_method,
    meta_model,
    remark,
    schedule_of,
)
from gradhpo.studies.shared.pixels import load_pixels

__all__ = ["Config", "run"]

VAL_TASKS = 10  # behind every point of a curve
BASELINE = "one_step"


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv` and `accuracy.png`."""
    begun = time.perf_counter()
    config = config.reduced
    data = load_pixels(config.dataset, config.data_dir, config.side)
    images, labels = data.train
    train, val, test = samples(config, labels, images.shape[1])
    model = meta_model(config.model, images.shape[1:], config.ways, config.channels)
    learner = Learner(model, images, train, _schedule(config))
    methods = config.method or META_METHODS
    plan = Run(config.episodes, config.meta_batch, config.rate, config.points)
    values: dict[str, dict[str, list]] = {method: {} for method in methods}
    for seed, method in itertools.product(range(config.seeds), methods):
        before, how = time.perf_counter(), (learner, method, seed, plan, val, test, config.tests)
        found, said = once(f"seed {seed}, {method}", _trained, *how)
        for metric, value in found.items():
            values[method].setdefault(metric, []).append(value)
        progress(
            f"many_shot: {config.model}, seed {seed}, {method}: test accuracy "
            f"{100 * found['test_accuracy']:.2f} %{said}, "
            f"{time.perf_counter() - before:.0f} s"
        )
    costs = {method: _cost(method, config) for method in methods}
    table = [_row(method, values, costs[method], config) for method in methods]
    for row in table:
        progress("many_shot: " + ", ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    return StudyResult(
        f"many_shot ({config.model})",
        config,
        summarize(values, costs, baseline=BASELINE if BASELINE in methods else None),
        time.perf_counter() - begun,
        data.files,
        {
            "table.csv": lambda path: write_csv(path, [*table[0]], [[*r.values()] for r in table]),
            "accuracy.png": lambda path: _draw(values, config, path),
        },
    )


def _trained(
    learner: Learner, method: str, seed: int, plan: Run, val: ManyShot, test: ManyShot, tests: int
) -> tuple[dict[str, Any], str]:
    """The metrics of one seed, and a remark."""
    curve: list[Score] = []

    def watch(state: BilevelState) -> None:
        curve.append(learner.test(state, val, min(VAL_TASKS, tests)))

    state = learner.train(method, seed, plan, watch)
    score = learner.test(state, test, tests)
    return {
        "test_loss": score.loss.mean(),
        "test_accuracy": score.accuracy.mean(),
        "val_loss_by_epoch": np.array([point.loss.mean() for point in curve]),
        "val_accuracy_by_epoch": np.array([point.accuracy.mean() for point in curve]),
    }, remark(state)


def _schedule(config: Config) -> Schedule:
    return schedule_of(config.model, config.steps, config.every, config.gamma)


def _cost(method: str, config: Config) -> Cost:
    """Of all tasks of a seed's meta-training."""
    estimator = over_tasks(meta_method(method, _schedule(config)), config.meta_batch)
    return estimator.cost(config.steps, 1, episodes=config.episodes, period=FIT_PERIOD)


def _row(method: str, values: dict[str, Any], cost: Cost, config: Config) -> dict[str, object]:
    """A method's row of the table: what is found, then what is published. Per cent, and products
    per inner-optimization of one task."""
    accuracy = {name: 100 * np.array(found["test_accuracy"]) for name, found in values.items()}
    row: dict[str, object] = {"method": method, **_columns("accuracy", interval(accuracy[method]))}
    for other in (BASELINE, "fo"):
        known = other in accuracy and other != method
        summary = paired(accuracy[method], accuracy[other]) if known else None
        row |= _columns(f"minus_{other}", summary)
    row["products"] = round(cost.products / (config.episodes * config.meta_batch), 1)
    on, published = reported(config.model, config.dataset)
    mean, half = published.get(method, ("", ""))
    row |= {"published_on": on, "published": mean, "published_half": half}
    row["published_products"] = products(config.model, method)
    return row


def _columns(name: str, summary: Summary | None) -> dict[str, object]:
    """Mean and interval; empty where there is nothing to compare."""
    if summary is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), "")
    low, high = summary.ci95
    numbers = {name: summary.mean, f"{name}_low": low, f"{name}_high": high}
    return {key: round(float(value), 2) for key, value in numbers.items()}


def _draw(values: dict[str, dict[str, list]], config: Config, path: Path) -> None:
    each = config.episodes // config.points
    accuracy = {name: 100 * np.array(v["val_accuracy_by_epoch"]) for name, v in values.items()}
    plots.curves(
        accuracy,
        path,
        f"inner-optimizations / {each}",
        "accuracy on tasks of other classes, %",
        f"{config.model}, {Path(config.dataset).name}, {config.ways} ways, T = {config.steps}",
        band=config.seeds > 2,
        within=(0, 100),
    )
