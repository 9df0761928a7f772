"""The run of the study: both stages by every method, scores, files."""

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gradhpo import datasets
from gradhpo.core.source import Picked
from gradhpo.core.types import DataBatch
from gradhpo.meta.networks import ConvNet
from gradhpo.report import StudyResult, interval, paired, plots, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.studies.shared.pixels import load_pixels
from gradhpo.studies.two_stage.stages import METHODS, PERIOD, Halves, Stages

__all__ = ["Config", "run"]

FIXED, HALF = "fixed", "val_half"
BASELINE = "one_step"
PUBLISHED = {
    "one_step": (70.15, 1.24),
    "implicit_neumann": (70.85, 0.63),
    "hyperdistill": (72.68, 1.15),
}
"""Lee et al. (2022), table 5: test accuracy in per cent, half of its 95 % interval."""
TEST_SHARE = 6  # of a set without test images, one in so many is tested on
LOSSES = np.linspace(0, 8, 41)  # at which the learned weight is shown


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study; the defaults are the paper's.

    Raises:
        ValueError: a number is out of range.

    >>> Config(steps=100).gamma
    0.9
    """

    baselines = (FIXED, HALF)

    out: Path = Path("results/two_stage")
    dataset: str = "cifar10"
    """A labelled set of images by its name, or the path of a folder of class folders."""
    small: bool = False
    """Sizes that two cores can do: images of 16 pixels, 8 channels, 2000 steps, 3 seeds."""
    side: int = 0
    """Pixels to shrink the images to, a divisor of their side; 0 keeps them."""
    channels: int = 32
    """Channels of every layer."""
    steps: int = 10_000
    """Training steps of either stage."""
    batch_size: int = 100
    """Images of a batch."""
    label_noise: float = 0.4
    """Part of the labels replaced by random ones, which may be the right ones."""
    noisy_val: bool = False
    """Replace labels of the validation half as well."""
    gamma: float = 0.9
    """Discount of HyperDistill."""
    points: int = 10
    """Points of the curves of the second stage, a divisor of `steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(side=0, channels=1, batch_size=1, points=1, steps=self.points)
        if self.steps % PERIOD:
            raise ValueError(f"steps={self.steps} is no multiple of {PERIOD}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return (*cls.baselines, *METHODS)

    @property
    def reduced(self) -> "Config":
        """With what `small` and `fast` ask for."""
        most: dict[str, int] = {}
        if self.small or self.fast:
            most = {"channels": 8, "steps": 2000, "seeds": 3}
        if self.fast:
            most |= {"steps": 100, "seeds": 2}
        reduced = {name: min(getattr(self, name), n) for name, n in most.items()}
        return replace(self, **reduced, side=self.side or (16 if most else 0))


class Part(NamedTuple):
    """What one seed works with."""

    images: np.ndarray
    halves: Halves
    test: DataBatch


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `accuracy.png` and `weights.png`."""
    begun = time.perf_counter()
    config = config.reduced
    data = load_pixels(config.dataset, config.data_dir, config.side)
    net = ConvNet(data.train.inputs.shape[1:], data.num_classes, config.channels)
    stages = Stages(net, config.steps, config.batch_size)
    methods = config.method or (FIXED, HALF, *METHODS)
    values: dict[str, dict[str, list[Any]]] = {method: {} for method in methods}
    weights: dict[str, list[np.ndarray]] = {method: [] for method in methods if method != HALF}
    for seed, method in itertools.product(range(config.seeds), methods):
        before = time.perf_counter()
        how = stages, method, data, config, seed
        curve, weight, said = once(f"seed {seed}, {method}", _both, *how)
        for metric, value in {"": curve[-1], "_by_epoch": curve}.items():
            values[method].setdefault(f"test_accuracy{metric}", []).append(value)
        if method in weights:
            weights[method].append(weight)
        progress(
            f"two_stage: seed {seed}, {method}: test accuracy {100 * curve[-1]:.2f} %{said}, "
            f"{time.perf_counter() - before:.0f} s"
        )
    costs = {method: _cost(method, config) for method in methods}
    return StudyResult(
        "two_stage",
        config,
        summarize(values, costs, baseline=BASELINE if BASELINE in methods else None),
        time.perf_counter() - begun,
        data.files,
        {
            "table.csv": lambda path: _write(values, path),
            "accuracy.png": lambda path: plots.curves(
                {m: 100 * np.array(v["test_accuracy_by_epoch"]) for m, v in values.items()},
                path,
                f"steps of the second stage / {config.steps // config.points}",
                "test accuracy, %",
                f"{Path(config.dataset).name}, {100 * config.label_noise:g} % of the labels random",
                band=config.seeds > 2,
                within=(0, 100),
            ),
            "weights.png": lambda path: _draw_weights(weights, path),
        },
    )


def _both(
    stages: Stages, method: str, data: datasets.Dataset, config: Config, seed: int
) -> tuple[np.ndarray, Any, str]:
    """The accuracies of the second stage, and the weights by loss and a remark of the first."""
    part = _part(data, config, seed)
    lam, said = stages.first(method, config.gamma, seed, part.images, part.halves)
    used = part.halves.val if method == HALF else part.halves.whole
    curve = stages.second(lam, seed, part.images, used, part.test, config.points)
    return curve, stages.model.weight(lam, jnp.asarray(LOSSES)), said


def _part(data: datasets.Dataset, config: Config, seed: int) -> Part:
    """Halves of the training images, with noise on their labels, and test images in random order,
    the statistics of whose batches batch norm takes."""
    generator = np.random.default_rng(seed)
    images, labels = data.train
    rows, test = generator.permutation(len(labels)), data.test
    if test is None:
        held, rows = np.split(rows, [len(rows) // TEST_SHARE])
        test = DataBatch(images[held], labels[held])
    order = generator.permutation(len(test.targets))
    half = len(rows) // 2
    given, _ = datasets.corrupt_labels(seed, labels, config.label_noise, data.num_classes)
    train, val = (Picked(part, given[part]) for part in (rows[:half], rows[half : 2 * half]))
    if not config.noisy_val:
        val = Picked(val.rows, labels[val.rows])
    return Part(images, Halves(train, val), DataBatch(test.inputs[order], test.targets[order]))


def _cost(method: str, config: Config) -> tuple[float, float]:
    """Of both stages of a seed, without the tests."""
    if method not in METHODS:
        return config.steps, 0
    first = METHODS[method](config.gamma).cost(config.steps, 1)
    return first.gradients + config.steps, first.products


def _write(values: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """Accuracies in per cent, found and published."""
    accuracy = {name: 100 * np.array(found["test_accuracy"]) for name, found in values.items()}
    header = ["method", "accuracy", "low", "high", f"minus_{BASELINE}", "low", "high"]
    table = []
    for name, each in accuracy.items():
        summaries = [interval(each)]
        if BASELINE in accuracy:
            summaries.append(paired(each, accuracy[BASELINE]))
        numbers = [x for s in summaries for x in (s.mean, *s.ci95)] + [np.nan] * 3
        row = [f"{float(x):.2f}" for x in numbers[:6]]
        table.append([name, *row, *PUBLISHED.get(name, ("", ""))])
    write_csv(path, [*header, "published", "published_half"], table)


def _draw_weights(weights: dict[str, list[np.ndarray]], path: Path) -> None:
    """What an example counts by its loss, as each method has learned it."""
    figure = new_figure(6.4, 4.0)
    axes = new_axes(figure, "weight of an example, mean over seeds", "its loss", "weight")
    axes.set_ylim(0, 1)
    lines = {method: Line(LOSSES, np.mean(each, axis=0)) for method, each in weights.items()}
    draw_lines(axes, lines)
    save(figure, path)
