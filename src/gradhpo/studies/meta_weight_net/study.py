"""The run of the study: settings, one run of each method on each trial, results."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from gradhpo import datasets
from gradhpo.core.types import DataBatch
from gradhpo.report import MethodResult, StudyResult
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.meta_weight_net import tables
from gradhpo.studies.meta_weight_net.tables import Results, Trial
from gradhpo.studies.meta_weight_net.training import METHODS, NET, UNTOUCHED, Run, draws, train
from gradhpo.studies.shared.cells import summarize_cells
from gradhpo.studies.shared.detection import detection
from gradhpo.studies.shared.images import ImageConfig, Parts, parts

__all__ = ["Config", "run"]

POINTS = 30  # of a curve


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().val_size
    (1000, 100)
    """

    baselines = tables.BASELINES

    out: Path = Path("results/meta_weight_net")
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    """Data set; digits come with scikit-learn (and are 1797 images: give smaller sizes)."""
    train_size: int = 5000
    """Training examples, drawn for each seed."""
    val_size: tuple[int, ...] = (1000, 100)
    """Clean examples, from the training images; the study is run with each of these numbers."""
    label_noise: float = 0.4
    """Part of the training labels replaced by random classes, which may be the right ones."""
    steps: int = 3000
    """Training steps; the weight net moves after each. Rounded down to a multiple of 30."""
    batch_size: int = 100
    """Examples of a batch, of either kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=1, steps=POINTS, batch_size=1)
        if not self.val_size or min(self.val_size) < 1:
            raise ValueError(f"val_size must be numbers of at least 1, not {self.val_size}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return (*cls.baselines, *METHODS)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `accuracy.png` and `weights.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = _reduced(config)
    data = datasets.load(config.dataset, config.data_dir)
    asked = [m for m in config.method or METHODS if m in METHODS]
    results: Results = {}
    for clean in config.val_size:
        sizes = ImageConfig(
            train_size=config.train_size, val_size=clean, label_noise=config.label_noise
        )
        cell = results.setdefault(f"{clean} clean", {})
        for seed in range(config.seeds):
            part, where = parts(data, sizes, seed), f"{clean} clean, seed {seed}"
            for method, trial in _trials(where, part, asked, config, seed):
                cell.setdefault(method, []).append(trial)
                progress(f"meta_weight_net: {clean} clean, seed {seed}, {method}: {trial.told()}")
    rows = tables.rows(results)
    for row in rows:
        progress(f"meta_weight_net: {tables.told(row)}")
    return StudyResult(
        "meta_weight_net",
        config,
        _summaries(results, config),
        time.perf_counter() - begun,
        data.files,
        {
            "table.csv": lambda path: tables.write(rows, path),
            "accuracy.png": lambda path: tables.draw_accuracy(results, config.steps, path),
            "weights.png": lambda path: tables.draw_weights(results, path),
        },
    )


def _reduced(config: Config) -> Config:
    """What ends within two minutes on two slow cores."""
    most = {"seeds": 2, "steps": 600, "train_size": 2000}
    smaller = {name: min(getattr(config, name), n) for name, n in most.items()}
    return replace(config, val_size=config.val_size[:1], **smaller)


def _trials(
    where: str, part: Parts, asked: list[str], config: Config, seed: int
) -> Iterator[tuple[str, Trial]]:
    """The baselines and the methods on the data of one seed, from the same weights."""
    noisy, val, test = (DataBatch(*map(jnp.asarray, each)) for each in part[:3])
    both = DataBatch(*(jnp.concatenate(pair) for pair in zip(noisy, val, strict=True)))
    points, steps = POINTS, config.steps // POINTS * POINTS
    runs = {
        "untouched": (UNTOUCHED, noisy),
        "clean": (UNTOUCHED, val),
        "mixed": (UNTOUCHED, both),
        **{name: (METHODS[name], noisy) for name in asked},
    }
    for name, (method, train_on) in runs.items():
        sizes = len(train_on.targets), len(val.targets)
        rows = draws(seed, sizes, config.batch_size, steps)
        how = method, seed, (train_on, val, test), rows, points
        found = once(f"{where}, {name}", train, *how, types=(Run,))
        test_accuracy, val_accuracy = found.test[:, 1], found.val[:, 1]
        trial = Trial(test_accuracy[-1], val_accuracy[-1], test_accuracy)
        if method.weighted:
            seen = np.array([detection(weights, part.wrong) for weights in found.weights])
            trial = trial._replace(detections=seen, hyperparams=found.hyperparams)
        yield name, trial
        if name == "untouched":
            best = np.argmax(val_accuracy)
            yield "stopped", Trial(test_accuracy[best], val_accuracy[best])


def _summaries(results: Results, config: Config) -> dict[str, MethodResult]:
    """Means and differences to training that is stopped early."""
    values: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, found in results.items():
        for method, trials in found.items():
            metrics = values.setdefault(cell, {}).setdefault(method, {})
            metrics["test_accuracy"] = [trial.accuracy for trial in trials]
            metrics["val_accuracy"] = [trial.val_accuracy for trial in trials]
            if trials[0].curve is not None:
                metrics["test_accuracy_by_epoch"] = [trial.curve for trial in trials]
    used = {m: METHODS[m].estimator for m in next(iter(values.values())) if m in METHODS}
    costs = {m: each.cost(config.steps, NET.hidden) for m, each in used.items()}
    costs |= dict.fromkeys(tables.BASELINES, (config.steps, 0))
    return summarize_cells(values, costs, "stopped")
