"""The run of the study: settings, the contestants on every seed, what they found and its cost."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from gradhpo.core.task import Task
from gradhpo.datasets import Dataset
from gradhpo.estimators.reverse import reverse
from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.image_training.figures import draw
from gradhpo.studies.image_training.problem import ByHand, Sizes, start, task
from gradhpo.studies.shared.pixels import load_pixels
from gradhpo.tuning.comparing import so_far
from gradhpo.tuning.judging import judged
from gradhpo.tuning.methods import chosen
from gradhpo.tuning.searches import STUDIED, as_gradients, require_optuna
from gradhpo.tuning.sequences import Training, by_hypergradients, by_search, cost, ended, lowest
from gradhpo.tuning.training import Length, left_alone

__all__ = ["BY_HAND", "GRID", "TUNING_SEEDS", "Config", "run"]

SIDE = 16  # pixels of an image, each the mean of four
# By hand: the lowest mean validation loss of the grid, on seeds that the comparison does not use.
# It lies on an edge; strengths of 0.3 and a peak of 0.024, looked at beside it, were worse.
GRID = ByHand(
    peak=(3e-3, 6e-3, 1.2e-2),
    decay=(1e-2, 1e-1),
    smoothing=(0.02, 0.1),
    strength=(0.05, 0.1, 0.2),
)
TUNING_SEEDS = (1000, 1001, 1002)
BY_HAND = ByHand(peak=1.2e-2, decay=1e-1, smoothing=0.1, strength=0.2)


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().known_methods()[:3]
    ('fixed', 'random', 'tpe')
    """

    baselines = ("fixed", *STUDIED)

    out: Path = Path("results/image_training")
    dataset: Literal["cifar10"] = "cifar10"
    """Data set, from the official files or from class folders; a part of it is enough."""
    train_size: int = Sizes().train
    """Training examples."""
    val_size: int = Sizes().val
    """Validation examples, which only the hyperparameters see; from the training data."""
    batch_size: int = Sizes().batch
    """Examples of a training step."""
    steps: int = Sizes().steps
    """Steps of a training."""
    trainings: int = 10
    """Trainings by reverse mode; the other methods get as many gradients."""
    outer_rate: float = 0.3
    """Rate of the outer Adam at the first training; a cosine takes it to 0 after the last."""
    width: float = 1.0
    """A search draws from this far to both sides of the start, as logarithms."""
    tune: bool = False
    """First search the grid of what is set by hand anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=1, val_size=1, batch_size=1, steps=1, trainings=1)


class Found(NamedTuple):
    """What a contestant has done on one seed."""

    spent: list[float]  # gradients up to the end of every training
    judged: list[dict[str, float]]  # how its model does
    best: dict[str, float]  # that of the lowest validation loss
    used: dict[str, float]  # the hyperparameters it was trained with
    so_far: np.ndarray  # the lowest validation loss at each part of the budget
    cost: tuple[float, float]  # gradients, and products of second order
    seconds: float  # of the processor


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the contestants; a row for every training is in `trainings.csv`."""
    begun = time.perf_counter()
    if config.fast:
        least = {"seeds": 2, "steps": 100, "trainings": 4}
        config = replace(config, **{k: min(getattr(config, k), n) for k, n in least.items()})
    methods = config.method or ("reverse", "tpe", "fixed")
    if set(methods) & set(STUDIED):
        require_optuna()
    data = load_pixels(config.dataset, config.data_dir, SIDE)
    grid = _grid(data, config, progress) if config.tune else {}
    by_hand = min(grid, key=grid.__getitem__) if grid else BY_HAND
    make = _maker(data, config, by_hand)
    numbers = len(jax.tree.leaves(start(by_hand)))
    price = reverse(config.steps).cost(config.steps, numbers, episodes=config.trainings)
    budget = as_gradients(price)
    outer = optax.adam(optax.cosine_decay_schedule(config.outer_rate, config.trainings))
    found: dict[str, list[Found]] = {name: [] for name in methods}
    values: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    costs: dict[str, tuple[float, float]] = {}
    for seed, name in itertools.product(range(config.seeds), methods):
        how = make, config, budget, outer, name, seed
        done = once(f"seed {seed}, {name}", _contest, *how, types=(Found,))
        found[name].append(done)
        curve = {"val_loss_by_epoch": done.so_far, "seconds": done.seconds}
        values[name].append(done.best | curve)
        costs[name] = done.cost
        progress(
            f"image_training: {config.dataset}, seed {seed}, {name}: {len(done.spent)} trainings "
            f"in {done.seconds:.0f} s of the processor, validation loss "
            f"{done.best['val_loss']:.4f}, test accuracy {100 * done.best['test_accuracy']:.2f} %"
        )
    columns = {
        name: {key: np.stack([seed[key] for seed in each]) for key in each[0]}
        for name, each in values.items()
    }
    used = {name: [done.used for done in runs] for name, runs in found.items()}
    files: dict[str, Any] = {
        "hyperparameters.csv": partial(_write_used, used),
        "trainings.csv": partial(_write_trainings, found),
    }
    if grid:
        files["grid.csv"] = partial(_write_grid, grid)
    losses = {name: each["val_loss_by_epoch"] for name, each in columns.items()}
    files["training.png"] = partial(draw, losses, used, budget)
    return StudyResult(
        "image_training",
        config,
        summarize(columns, costs, baseline=methods[0] if len(methods) > 1 else None),
        time.perf_counter() - begun,
        data.files,
        files,
    )


def _maker(data: Dataset, config: Config, by_hand: ByHand) -> Callable[[int], Task]:
    """The task of a seed, made once: its data stay where they are."""
    sizes = Sizes(config.steps, config.batch_size, config.train_size, config.val_size)
    return lru_cache(maxsize=1)(partial(task, data, sizes, start(by_hand)))


def _contest(
    make: Callable[[int], Task],
    config: Config,
    budget: float,
    outer: optax.GradientTransformation,
    name: str,
    seed: int,
) -> Found:
    since = time.process_time()
    done = _trainings(make, config, budget, outer, name, seed)
    seconds, best = time.process_time() - since, lowest(done)
    return Found(
        [each.spent for each in done],
        [each.judged for each in done],
        best.judged,
        best.trial.history.start,
        so_far(done, budget),
        cost(done),
        seconds,
    )


def _trainings(
    make: Callable[[int], Task],
    config: Config,
    budget: float,
    outer: optax.GradientTransformation,
    name: str,
    seed: int,
) -> list[Training]:
    """Those of one contestant."""
    length = Length(1, config.steps)
    if name == "fixed":
        trial = left_alone(make(seed), length)
        return [ended(config.steps, trial)]
    if name in STUDIED:
        return by_search(make, name, length, int(budget // config.steps), seed, config.width)
    return list(by_hypergradients(make, chosen(name), outer, length, budget, seed))


def _grid(data: Dataset, config: Config, progress: Progress) -> dict[ByHand, float]:
    """Mean validation loss over the tuning seeds of all that may be set by hand."""
    found = {}
    for values in itertools.product(*GRID):
        by_hand = ByHand(*values)
        found[by_hand] = once(f"by hand, {values}", _by_hand, data, config, by_hand)
        progress(f"image_training: by hand, {values}: validation loss {found[by_hand]:.4f}")
    return found


def _by_hand(data: Dataset, config: Config, by_hand: ByHand) -> float:
    make = _maker(data, config, by_hand)
    trials = [left_alone(make(seed), Length(1, config.steps)) for seed in TUNING_SEEDS]
    return float(np.mean([judged(trial)["val_loss"] for trial in trials]))


def _write_used(used: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """The hyperparameters of the model that counts, a row for each number."""
    table = [
        [method, seed, name, value]
        for method, runs in used.items()
        for seed, each in enumerate(runs)
        for name, value in each.items()
    ]
    write_csv(path, ["method", "seed", "hyperparameter", "value"], table)


def _write_trainings(found: Mapping[str, list[Found]], path: Path) -> None:
    """A row for every training: the gradients spent up to its end, and how its model does."""
    fields = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
    table = [
        [method, seed, spent, *(judged[field] for field in fields)]
        for method, runs in found.items()
        for seed, done in enumerate(runs)
        for spent, judged in zip(done.spent, done.judged, strict=True)
    ]
    write_csv(path, ["method", "seed", "gradients", *fields], table)


def _write_grid(grid: Mapping[ByHand, float], path: Path) -> None:
    write_csv(path, [*ByHand._fields, "val_loss"], [[*by_hand, x] for by_hand, x in grid.items()])
