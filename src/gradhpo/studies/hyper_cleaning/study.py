"""The run of the study: settings, one run of each method on each trial, results."""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradhpo import datasets
from gradhpo.core.estimator import Cost
from gradhpo.core.types import DataBatch
from gradhpo.report import MethodResult, StudyResult
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.parts import once
from gradhpo.studies.hyper_cleaning import tables
from gradhpo.studies.hyper_cleaning.model import METHODS, estimator, examples
from gradhpo.studies.hyper_cleaning.network import init
from gradhpo.studies.hyper_cleaning.tables import Cell, Results, Trial
from gradhpo.studies.hyper_cleaning.training import (
    FIT_PERIOD,
    Data,
    Momentum,
    Run,
    Setting,
    train,
    train_by_search,
)
from gradhpo.studies.shared.cells import summarize_cells
from gradhpo.studies.shared.detection import detection
from gradhpo.studies.shared.images import ImageConfig, Parts, parts
from gradhpo.tuning.searches import STUDIED, as_gradients, require_optuna

__all__ = ["Config", "run"]

COMPARED = METHODS[:4]
POINTS = 40  # of a curve
LAST = ("test_loss", "test_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range, or HyperDistill is asked to carry momentum on.

    >>> Config(dataset=("mnist",)).label_noise
    (0.3, 0.5)
    """

    out: Path = Path("results/hyper_cleaning")
    dataset: tuple[Literal["mnist", "fashion_mnist", "digits"], ...] = ("mnist", "fashion_mnist")
    """Data sets; digits come with scikit-learn (and are 1797 images: give smaller sizes)."""
    data_dir: Path | None = None
    """Directory that holds the data files; by default the cache, filled by a download."""
    label_noise: tuple[float, ...] = (0.3, 0.5)
    """Parts of the training labels replaced by random classes, which may be the right ones."""
    momentum: tuple[Momentum, ...] = ("carried", "fresh")
    """Whether the momentum of training goes on after an update of the weights or starts anew."""
    validation: Literal["test", "train"] = "test"
    """Where the clean examples come from: the first test images, or training images that are not
    trained on. The other test images test."""
    train_size: int = 1000
    """Training examples, drawn for each seed."""
    val_size: int = 1000
    """Clean examples. The paper takes all 10000 test images, and tests on them as well."""
    updates: int = 200
    """Updates of the weights of the examples."""
    steps: int = 10
    """Training steps T between two updates, which are the horizon of the methods."""
    gamma: float = 0.9
    """Discount of the greedy method and of HyperDistill."""
    budget: float | None = None
    """Mean of all weights, kept by projection onto a simplex; none: each weight is the sigmoid of
    a number, and free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=1, val_size=1, updates=1, steps=1)
        for name in ("dataset", "label_noise", "momentum"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value.")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget is the mean of all weights, above 0, not {self.budget}.")
        if "hyperdistill" in self.method and "carried" in self.momentum:
            raise ValueError(
                "hyperdistill fits theta to whole episodes, and momentum that is carried on leaves "
                "none: give --momentum fresh."
            )

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return (*METHODS, *STUDIED)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `detection.csv`, `accuracy.png`, `weights.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = _reduced(config)
    methods = tuple(dict.fromkeys(("fixed", *(config.method or COMPARED))))
    if set(methods) & set(STUDIED):
        require_optuna()
    costs = {method: _cost(method, config) for method in methods if method not in STUDIED}
    trials = _trials(costs, config)
    for method in set(methods) & set(STUDIED):
        costs[method] = Cost(trials * config.updates * config.steps, 0)
    results: Results = {}
    files: dict[str, str] = {}
    for name in config.dataset:
        loaded = datasets.load(name, config.data_dir)
        files |= loaded.files
        for noise, seed in itertools.product(config.label_noise, range(config.seeds)):
            part = _parts(loaded, config, noise, seed)
            where = f"{name} {noise}, seed {seed}"
            for momentum, method, found in _runs(where, part, methods, config, seed, trials):
                cell = Cell(name, noise, momentum)
                results.setdefault(cell, {}).setdefault(method, []).append(Trial(found, part.wrong))
                auc = detection(found.weights, part.wrong).auc
                progress(
                    f"hyper_cleaning: {cell}, seed {seed}, {method}: test accuracy "
                    f"{100 * found.last[1]:.2f} %, {100 * found.stopped:.2f} % stopped early"
                    + f", AUC {auc:.3f}"
                    * (method != "fixed")
                )
    rows = tables.rows(
        results, {m: products / config.updates for m, (_, products) in costs.items()}
    )
    for row in rows:
        progress(f"hyper_cleaning: {tables.told(row)}")
    return StudyResult(
        "hyper_cleaning",
        config,
        _summaries(results, costs),
        time.perf_counter() - begun,
        files,
        {
            "table.csv": lambda path: tables.write_table(rows, path),
            "detection.csv": lambda path: tables.write_detection(results, path),
            "accuracy.png": lambda path: tables.draw_accuracy(results, config.updates, path),
            "weights.png": lambda path: tables.draw_weights(results, path),
        },
    )


def _reduced(config: Config) -> Config:
    """What ends within two minutes on two slow cores."""
    most = {"seeds": 2, "updates": 30, "train_size": 500, "val_size": 500}
    cells = {"dataset": config.dataset[:1], "label_noise": config.label_noise[-1:]}
    cells["momentum"] = config.momentum[-1:]
    return replace(config, **cells, **{k: min(getattr(config, k), n) for k, n in most.items()})


def _parts(data: datasets.Dataset, config: Config, noise: float, seed: int) -> Parts:
    """The examples of a trial. A data set without test images of its own has one way to split."""
    sizes = ImageConfig(train_size=config.train_size, val_size=config.val_size, label_noise=noise)
    part = parts(data, sizes, seed)
    if config.validation == "train" or data.test is None:
        return part
    images, labels = data.test
    n = config.val_size
    if n > len(labels):
        raise ValueError(f"{data.name} has {len(labels)} test images, fewer than val_size {n}.")
    part = part._replace(val=DataBatch(images[:n], labels[:n]))
    return part._replace(test=DataBatch(images[n:], labels[n:]) if n < len(labels) else part.val)


def _runs(
    where: str, part: Parts, methods: tuple[str, ...], config: Config, seed: int, trials: int
) -> Iterator[tuple[Momentum, str, Run]]:
    """Every method on one trial, all from the same weights of the network."""
    data = Data(*(examples(each) for each in part[:3]))
    params = init(seed, part.train.inputs)
    for momentum, method in itertools.product(config.momentum, methods):
        setting = Setting(method, momentum, config.steps, config.gamma, config.budget)
        how: tuple[Any, ...] = setting, params, data, config.updates, POINTS
        by = train
        if method in STUDIED:
            by, how = train_by_search, (*how, trials, seed)
        yield momentum, method, once(f"{where}, {momentum}, {method}", by, *how, types=(Run,))


def _trials(costs: Mapping[str, Cost], config: Config) -> int:
    """Trainings of a search: as many as have the gradients of the dearest of the others."""
    most = max(as_gradients(cost) for cost in costs.values())
    return round(most / (config.updates * config.steps))


def _cost(method: str, config: Config) -> Cost:
    """Gradient evaluations and second-order products of one run."""
    made = estimator(method, config.steps, config.gamma)
    return made.cost(config.steps, config.train_size, episodes=config.updates, period=FIT_PERIOD)


def _summaries(
    results: Results, costs: Mapping[str, tuple[float, float]]
) -> dict[str, MethodResult]:
    """Means and differences to "fixed" of the same cell."""
    values = {
        str(cell): {
            method: {
                **dict(zip(LAST, np.transpose([run.last for run, _ in trials]), strict=True)),
                "test_accuracy_by_epoch": np.array([run.test[:, 1] for run, _ in trials]),
                "val_accuracy_by_epoch": np.array([run.val[:, 1] for run, _ in trials]),
            }
            for method, trials in found.items()
        }
        for cell, found in results.items()
    }
    return summarize_cells(values, costs, "fixed")
