"""The run of the study: settings, the methods on every seed, which features they kept."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from gradhpo import datasets
from gradhpo.report import StudyResult, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import label_ends, new_axes, new_figure, save, styles
from gradhpo.report.parts import once
from gradhpo.studies.feature_selection.methods import METHODS, Budget, Found, by, cost
from gradhpo.studies.feature_selection.problem import data
from gradhpo.studies.shared.cells import ends, summarize_cells
from gradhpo.tuning.searches import STUDIED, require_optuna

__all__ = ["Config", "run"]

Results = dict[str, dict[str, list[Found]]]
"""By data set and method, one for every seed."""


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config(dataset=("a9a",)).noise
    200
    """

    out: Path = Path("results/feature_selection")
    dataset: tuple[Literal["a9a", "ijcnn1"], ...] = ("a9a", "ijcnn1")
    """Data sets, of 123 and of 22 features."""
    data_dir: Path | None = None
    """Directory that holds the data files; by default the cache, filled by a download."""
    seeds: int = 10
    """Number of repetitions with different seeds."""
    noise: int = 200
    """Features to add, columns of the data set that are shuffled."""
    train_size: int = 1000
    """Training examples."""
    val_size: int = 4000
    """Validation examples."""
    test_size: int = 10_000
    """Test examples."""
    steps: int = 10
    """Training steps between two updates."""
    updates: int = 200
    """Updates of the scales."""
    price: float = 1.5e-3
    """What a scale of 1 costs in the outer problem, c."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(noise=0, train_size=1, val_size=1, test_size=1, steps=1, updates=1)
        if not self.dataset:
            raise ValueError("dataset needs at least one name.")
        if not self.price >= 0:
            raise ValueError(f"price must be at least 0, not {self.price}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return METHODS


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `selection.csv`, `features.csv`, `selection.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(
            config, dataset=config.dataset[-1:], seeds=min(config.seeds, 2), updates=60
        )
    methods = config.method or METHODS
    if set(methods) & set(STUDIED):
        require_optuna()
    budget = Budget(config.steps, config.updates, config.price)
    sizes = config.train_size, config.val_size, config.test_size
    results: Results = {}
    real: dict[str, int] = {}
    files: dict[str, str] = {}
    for name in config.dataset:
        loaded = datasets.load(name, config.data_dir)
        files |= loaded.files
        for seed in range(config.seeds):
            part = data(loaded, sizes, config.noise, seed)
            real[name] = part.real
            for method in methods:
                where = f"{name}, seed {seed}, {method}"
                found = once(where, by, method, budget, part, seed, types=(Found,))
                results.setdefault(name, {}).setdefault(method, []).append(found)
                kept, noise = _kept(found, part.real)
                progress(
                    f"feature_selection: {name}, seed {seed}, {method}: {kept} of {part.real} "
                    f"features and {noise} of {config.noise} noise features in use, validation "
                    f"loss {found.val[0]:.4f}, test {found.test[0]:.4f}"
                )
    features = max(real.values()) + config.noise
    if config.noise:
        for name, each in results.items():
            for method, runs in each.items():
                off = [1 - _kept(found, real[name])[1] / config.noise for found in runs]
                mean, low, high = ends(off)
                progress(
                    f"feature_selection: {name}, {method}: {100 * mean:.1f} % of the noise "
                    f"features off [{100 * low:.1f}, {100 * high:.1f}]"
                )
    values = {
        name: {
            method: {
                "val_loss": [found.val[0] for found in runs],
                "test_loss": [found.test[0] for found in runs],
                "test_accuracy": [found.test[1] for found in runs],
            }
            for method, runs in each.items()
        }
        for name, each in results.items()
    }
    costs = {method: cost(method, budget, features) for method in methods}
    return StudyResult(
        "feature_selection",
        config,
        summarize_cells(values, costs, baseline=methods[0]),
        time.perf_counter() - begun,
        files,
        {
            "selection.csv": partial(_write_selection, results, real),
            "features.csv": partial(_write_features, results, real),
            "selection.png": partial(_draw, results, real, config),
        },
    )


def _kept(found: Found, real: int) -> tuple[int, int]:
    """Real features in use, and noise features."""
    return int(found.used[:real].sum()), int(found.used[real:].sum())


def _write_selection(results: Results, real: dict[str, int], path: Path) -> None:
    """A row for each run."""
    table = [
        [name, method, seed, *_kept(found, real[name]), found.val[0], *found.test]
        + ["" if np.isnan(found.stationarity) else found.stationarity]
        for name, each in results.items()
        for method, runs in each.items()
        for seed, found in enumerate(runs)
    ]
    header = ["dataset", "method", "seed", "real", "noise", "val_loss", "test_loss"]
    write_csv(path, [*header, "test_accuracy", "outer_stationarity"], table)


def _write_features(results: Results, real: dict[str, int], path: Path) -> None:
    """For each real feature, in how many of the seeds it is in use."""
    table = [
        [name, method, i, count]
        for name, each in results.items()
        for method, runs in each.items()
        for i, count in enumerate(np.sum([found.used for found in runs], 0)[: real[name]])
    ]
    write_csv(path, ["dataset", "method", "feature", "seeds"], table)


def _draw(results: Results, real: dict[str, int], config: Config, path: Path) -> None:
    """The part of the real and of the noise features in use, over the updates."""
    figure = new_figure(1 + 4 * len(results), 3.6)
    panels = figure.subfigures(1, len(results), squeeze=False).ravel()
    for i, (panel, (name, each)) in enumerate(zip(panels, results.items(), strict=True)):
        label = "" if i else "per cent in use, mean over seeds"
        axes = new_axes(panel, f"{name}, price {config.price:g}", "updates of the scales", label)
        lines = []
        moving = [m for m in each if m != "ridge" and each[m][0].path is not None]
        for method, (color, _, marker) in styles(moving).items():
            paths = np.mean([run.path for run in each[method] if run.path is not None], 0)
            parts = {"real": paths[:, : real[name]], "noise": paths[:, real[name] :]}
            for dash, (kind, used) in zip(("-", ":"), parts.items(), strict=True):
                share = 100 * used.mean(1)
                x = np.arange(1, len(share) + 1)
                axes.plot(
                    *(x, share, marker), color=color, linestyle=dash, markevery=0.2, markersize=5
                )
                lines.append((f"{method}, {kind}", color, x[-1:], share[-1:]))
        axes.set_ylim(0, 103)
        axes.margins(x=0)
        label_ends(axes, lines)
    save(figure, path)
