"""The run of the study: settings, the comparison with the published numbers, files."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gradhpo.report import StudyResult, Summary, interval, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.studies.hypergradient_descent.figures import panels
from gradhpo.studies.hypergradient_descent.models import Images, images
from gradhpo.studies.hypergradient_descent.optimizers import OPTIMIZERS, Recipe
from gradhpo.studies.hypergradient_descent.published import LOSSES, PEAKS
from gradhpo.studies.hypergradient_descent.sweeps import Files, Values, grid, online_tuning
from gradhpo.studies.hypergradient_descent.training import BATCH, Curves, train

__all__ = ["Config", "run"]

COMPARED = ("sgd", "sgd_hd", "sgdn", "sgdn_hd", "adam", "adam_hd")
FAMILIES = {  # figure -> its methods; the last is drawn where one of optax.contrib took part
    "sgd": ("sgd", "sgd_hd"),
    "sgdn": ("sgdn", "sgdn_hd"),
    "adam": ("adam", "adam_hd"),
    "others": ("sgdn_hd", "adam", "adam_hd", "prodigy", "dadapt", "mechanize", "dog"),
}


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range, or VGG is asked for images that are not 32 x 32.

    >>> Config(model="mlp", seeds=1).dataset
    'mnist'
    """

    baselines = ()

    out: Path = Path("results/hypergradient_descent")
    seeds: int = 10
    dataset: Literal["mnist", "cifar10", "digits"] = "mnist"
    """Data set; VGG takes cifar10 only."""
    model: Literal["logreg", "mlp", "vgg"] = "logreg"
    """Model; on two cores an epoch of all six methods takes 1 s, 1 min and hours."""
    epochs: int = 10
    """Passes through the training data."""
    train_size: int = 0
    """Training examples; 0 means all."""
    learning_rate: float = 1e-3
    """Where every learning rate starts, eta_0."""
    decay: bool = False
    """Let Adam's steps fall as 1 / sqrt(t), as the paper does for logistic regression."""
    online_tuning: bool = False
    """Instead: SGD, SGD-HD, Adam and Adam-HD from initial rates 1e-1 ... 1e-6."""
    grid: bool = False
    """Instead: iterations to a minibatch loss of 0.29 over a grid of initial rates and betas."""
    cap: int = 20_000
    """Iterations after which the grid gives up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(epochs=1, cap=1, train_size=0)
        if 0 < self.train_size < BATCH:
            raise ValueError(f"train_size must be 0 or at least {BATCH}, a batch.")
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")
        if self.model == "vgg" and self.dataset != "cifar10":
            raise ValueError("VGG-16 takes images of 32 x 32 pixels: --dataset cifar10.")
        if self.grid and (self.online_tuning or self.model != "logreg"):
            raise ValueError("the grid is of logistic regression, and a run of its own.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(OPTIMIZERS)

    def recipes(self) -> dict[str, Recipe]:
        """The methods of the run with the authors' betas."""
        adam_beta = 1e-8 if self.model == "vgg" else 1e-7
        return {
            name: Recipe(
                name,
                (adam_beta if "adam" in name else 1e-3) if name.endswith("_hd") else 0.0,
                self.decay and name.startswith("adam"),
            )
            for name in self.method or COMPARED
        }


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study.

    Its files are `iterations.csv` (loss and rate of every step), for the authors' problems
    `published.csv`: our numbers beside theirs, and a figure of three panels per optimizer. The
    sweeps have tables and a figure of their own.
    """
    if config.fast:
        config = _reduced(config)
    begun = time.perf_counter()
    data = images(config.dataset, config.data_dir, config.train_size, 500 if config.fast else 0)
    if config.online_tuning:
        values, files = online_tuning(config.model, data, config.seeds, config.epochs, progress)
    elif config.grid:
        values, files = {}, grid(config.model, data, config.seeds, config.cap, progress)
    else:
        values, files = _compare(config, data, progress)
    steps = len(data.train.targets) // BATCH * config.epochs
    methods = summarize(values, {name: (steps, 0) for name in values})
    seconds = time.perf_counter() - begun
    return StudyResult("hypergradient_descent", config, methods, seconds, data.files, files)


def _reduced(config: Config) -> Config:
    """What ends within a minute on two slow cores; VGG takes some ten."""
    short = config.model == "vgg"
    most = {"seeds": 1 if short else 2, "epochs": 1 if short else 2, "cap": 500}
    config = replace(config, **{name: min(getattr(config, name), n) for name, n in most.items()})
    return replace(config, train_size=config.train_size or (2 if short else 8) * BATCH)


def _compare(config: Config, data: Images, progress: Progress) -> tuple[Values, Files]:
    """All methods from one initial rate."""
    recipes = config.recipes()
    found = train(
        config.model,
        recipes,
        (config.learning_rate,),
        data,
        config.seeds,
        config.epochs,
        progress,
    )
    curves = {name: each[0] for name, each in found.items()}
    files: Files = {"iterations.csv": lambda path: _write_iterations(curves, path)}
    authors_data = "cifar10" if config.model == "vgg" else "mnist"
    if (config.dataset, config.train_size, config.learning_rate, config.decay) == (
        *(authors_data, 0, 1e-3, False),
    ):
        rows = _beside_published(config.model, curves, progress)
        files["published.csv"] = lambda path: _write_published(rows, path)
    title = f"{config.model} on {config.dataset}"
    for name, members in FAMILIES.items():
        shown = {member: curves[member] for member in members if member in curves}
        if shown and (name != "others" or set(shown) - set(COMPARED)):
            files[f"{name}.png"] = lambda path, shown=shown: panels(shown, path, title)
    return {
        name: {"train_loss_by_epoch": each.train_loss.mean(-1), "val_loss_by_epoch": each.val_loss}
        for name, each in curves.items()
    }, files


def _write_iterations(curves: dict[str, Curves], path: Path) -> None:
    """A row per method, seed and step."""

    def rows():
        for name, each in curves.items():
            seeds = len(each.train_loss)
            pairs = zip(*(x.reshape(seeds, -1).tolist() for x in each[:2]), strict=True)
            for seed, (losses, rates) in enumerate(pairs):
                for i, row in enumerate(zip(losses, rates, strict=True), start=1):
                    yield [name, seed, i, *row]

    write_csv(path, ["method", "seed", "iteration", "train_loss", "learning_rate"], rows())


def _beside_published(
    model: str, curves: dict[str, Curves], progress: Progress
) -> list[tuple[str, str, int | str, Summary, float]]:
    """Method, quantity, epoch, our summary over seeds, and the number of the authors' one run."""
    rows = []
    for epoch, methods in LOSSES[model].items():
        for name, theirs in methods.items():
            if name not in curves or epoch > curves[name].val_loss.shape[1]:
                continue
            ours = curves[name].train_loss.mean(-1), curves[name].val_loss
            for what, values, number in zip(("train_loss", "val_loss"), ours, theirs, strict=True):
                rows.append((name, what, epoch, interval(values[:, epoch - 1]), number))
    for name, (rate, iteration) in PEAKS.get(model, {}).items():
        if name in curves:
            rates = curves[name].learning_rate.reshape(len(curves[name].val_loss), -1)
            rows.append((name, "peak_rate", "", interval(rates.max(1)), rate))
            rows.append((name, "peak_iteration", "", interval(rates.argmax(1) + 1.0), iteration))
    for name, what, epoch, summary, number in rows:
        mean, at = float(summary.mean), f" at epoch {epoch}" if epoch else ""
        progress(
            f"hypergradient_descent: {model}, {name}, {what}{at}: {mean:.4g}, published "
            f"{number:.4g} ({100 * (mean / number - 1):+.1f} %)"
        )
    return rows


def _write_published(rows: list[tuple[str, str, int | str, Summary, float]], path: Path) -> None:
    """A row for each; low and high are the ends of the 95 % interval."""
    table = [
        [name, what, epoch, float(summary.mean), *map(float, summary.ci95), number]
        for name, what, epoch, summary, number in rows
    ]
    write_csv(path, ["method", "quantity", "epoch", "mean", "low", "high", "published"], table)
