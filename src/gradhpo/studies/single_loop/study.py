"""The run of the study: settings, the search for rates, curves, files."""

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradhpo import datasets
from gradhpo.report import StudyResult, summarize
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.single_loop.entries import ENTRIES, GRID, RATES, cost
from gradhpo.studies.single_loop.figures import draw, write
from gradhpo.studies.single_loop.problem import Exact, Split, exact, logistic, split
from gradhpo.studies.single_loop.training import Curve, train

__all__ = ["Config", "run"]

POINTS = 20  # of a curve
TUNING_SEEDS = (1000, 1001, 1002, 1003, 1004)


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config(dataset="a9a").batch_size
    64
    """

    out: Path = Path("results/single_loop")
    dataset: Literal["ijcnn1", "a9a"] = "ijcnn1"
    """Data set; ijcnn1 has to be put into the data directory by hand, see the documents."""
    batch_size: int = 64
    """Examples of a batch, the parts that the data are cut into."""
    budget: int = 200_000
    """Gradient evaluations of a run; a second-order product counts as two."""
    tune: bool = False
    """Search the grid of rates first (minutes), as is always done for a9a."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(batch_size=1, budget=35 * POINTS)

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(ENTRIES)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run every method; its files are `points.csv`, `hypergradient.png` and `validation.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, seeds=min(config.seeds, 2), budget=min(config.budget, 20_000))
    loaded = datasets.load(config.dataset, config.data_dir)
    data = split(loaded)
    methods = config.method or tuple(ENTRIES)
    start = exact(data, np.zeros(data.train.inputs.shape[1]))
    rates = {m: _rates(m, data, start, config, progress) for m in methods}
    curves: dict[str, list[Curve]] = {m: [] for m in methods}
    for seed, method in itertools.product(range(config.seeds), methods):
        how = method, rates[method], data, start, config, seed, POINTS
        curve = once(f"seed {seed}, {method}", _train, *how, types=(Curve, Exact))
        curves[method].append(curve)
        progress(
            f"single_loop: {config.dataset}, seed {seed}, {method}: validation loss "
            f"{curve.value[-1]:.4f}, hypergradient {curve.hypergrad_norm[-1]:.1e}, "
            f"{curve.seconds[-1]:.1f} s"
        )
    values = {"fixed": _scores(data, [start] * config.seeds)}
    for method in methods:
        values[method] = _scores(data, [curve.last for curve in curves[method]])
        values[method]["val_loss_by_epoch"] = np.array([c.value[1:] for c in curves[method]])
    costs = {m: cost(m, config.budget, POINTS) for m in methods}
    norm, value = "norm of the exact hypergradient", "validation loss at the minimum"
    title = f"{config.dataset}, {config.seeds} seed{'s' * (config.seeds != 1)}"

    def figure(field: str, label: str):
        return lambda path: draw(curves, field, config.budget, title, path, label)

    files = {
        "points.csv": lambda path: write(curves, config.budget, path),
        "hypergradient.png": figure("hypergrad_norm", norm),
        "validation.png": figure("value", value),
    }
    return StudyResult(
        "single_loop",
        config,
        summarize(values, costs, baseline="fixed"),
        time.perf_counter() - begun,
        loaded.files,
        files,
    )


def _rates(
    method: str, data: Split, start: Exact, config: Config, progress: Progress
) -> tuple[float, float]:
    """`(inner, outer)`: looked up, or the best of the grid where there is nothing to look up."""
    if not config.tune and config.dataset in RATES:
        return RATES[config.dataset][method]
    found = {}
    for rates in GRID:
        part = f"{method} by {rates}"
        found[rates] = once(part, _worst, method, rates, data, start, config)
    best = min(found, key=found.__getitem__)
    progress(
        f"single_loop: {config.dataset}, {method}: inner and outer rate {best}, validation loss "
        f"{found[best]:.4f}"
    )
    return best


def _worst(
    method: str, rates: tuple[float, float], data: Split, start: Exact, config: Config
) -> float:
    """The highest validation loss of the tuning seeds; not all of them where it diverges."""
    worst = -np.inf
    for seed in TUNING_SEEDS:
        value = _train(method, rates, data, start, config, seed, 1).last.value
        worst = max(worst, value if np.isfinite(value) else np.inf)
        if worst >= start.value:
            break  # diverged
    return float(worst)


def _train(
    method: str,
    rates: tuple[float, float],
    data: Split,
    start: Exact,
    config: Config,
    seed: int,
    points: int,
) -> Curve:
    sizes = {"batch_size": config.batch_size, "budget": config.budget}
    return train(method, rates, data, start, **sizes, seed=seed, points=points)


def _scores(data: Split, found: list[Exact]) -> dict[str, Any]:
    """Losses at the minimum of the training loss for the last lam."""
    scores: dict[str, Any] = {"val_loss": [x.value for x in found]}
    if data.test is not None:
        inputs, labels = data.test
        scores["test_loss"] = [float(logistic(x.weights, inputs, labels)) for x in found]
        scores["test_accuracy"] = [
            float(np.mean(inputs @ x.weights * labels > 0)) if np.isfinite(x.value) else np.nan
            for x in found
        ]
    return scores
