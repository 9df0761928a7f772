"""Few hyperparameters at a time: top-k updates against dense ones, at equal coordinate updates.

Half of the labels of n examples are random, and every example has a weight in [0, 1], 1 at first.
Softmax regression is trained with these weights for T steps from zero; then the weights follow the
exact hypergradient of the loss on clean examples, by Adam and a projection onto their bounds:
all of them (`dense`), or only the part of them whose proposed steps promise most (`top_5` per cent
and so on, `gradhpo.transforms.top_k(score="progress")`). An update of k weights counts k, and all
methods move as many in total; what a hypergradient costs is the same for all, so the small parts
need more gradients, which stands beside it. Random search and TPE draw weights from [0, 1] and get
the gradients of `dense`.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import roll
from gradhpo.core.loop import run_episodes
from gradhpo.core.outer import followed_by
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.step import OuterOptimizer, init_state
from gradhpo.core.types import DataBatch
from gradhpo.estimators.reverse import reverse
from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.studies.shared.detection import detection
from gradhpo.studies.shared.images import ImageConfig, parts
from gradhpo.transforms import top_k
from gradhpo.tuning.searches import STUDIED, as_gradients, require_optuna, search

__all__ = ["Config", "run"]

CLASSES, RATE, MOMENTUM = 10, 0.1, 0.9
OUTER_RATE = 0.1  # of Adam
PARTS = {"dense": None, "top_20": 0.2, "top_5": 0.05, "top_1": 0.01}
METHODS = (*PARTS, *STUDIED)


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().dense_updates
    10
    """

    out: Path = Path("results/sparse")
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """Data set; digits come with scikit-learn."""
    seeds: int = 10
    """Number of repetitions with different seeds."""
    train_size: int = 300
    """Training examples n, as many hyperparameters."""
    val_size: int = 500
    """Clean examples."""
    label_noise: float = 0.5
    """Part of the training labels that is replaced by random classes."""
    steps: int = 50
    """Training steps T."""
    dense_updates: int = 10
    """Updates of all weights; an update of a part of them is made as many times more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=20, val_size=1, steps=1, dense_updates=1)
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is a part, between 0 and 1, not {self.label_noise}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return METHODS


class Found(NamedTuple):
    """One run; arrays over its updates, or over the trials of a search."""

    moved: np.ndarray  # weights moved so far, in units of all of them
    evaluations: np.ndarray  # gradients of the training loss so far
    val_loss: np.ndarray  # of a search the lowest so far
    weights: np.ndarray  # (n,), at the end


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `losses.csv`, `weights.csv`, `losses.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, seeds=min(config.seeds, 2), dense_updates=5)
    methods = config.method or METHODS
    if set(methods) & set(STUDIED):
        require_optuna()
    loaded = datasets.load(config.dataset, config.data_dir)
    found: dict[str, list[Found]] = {name: [] for name in methods}
    values: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    weighed = []
    sizes = ImageConfig(
        train_size=config.train_size, val_size=config.val_size, label_noise=config.label_noise
    )
    for seed in range(config.seeds):
        part = parts(loaded, sizes, seed)
        train, val, test = (_rows(each) for each in part[:3])
        for name in methods:
            by = _by_search if name in STUDIED else _by_hypergradients
            how = name, config, train, val, seed
            got = once(f"seed {seed}, {name}", by, *how, types=(Found,))
            found[name].append(got)
            loss, accuracy = _judged(config.steps, got.weights, train, test)
            for metric, value in zip(
                ("val_loss", "test_loss", "test_accuracy"),
                (got.val_loss[-1], loss, accuracy),
                strict=True,
            ):
                values[name].setdefault(metric, []).append(float(value))
            auc = detection(got.weights, part.wrong).auc
            weighed.append([name, seed, auc, int(np.sum(got.weights != 1))])
            progress(
                f"sparse: {config.dataset}, seed {seed}, {name}: validation loss "
                f"{got.val_loss[-1]:.4f}, test accuracy {100 * float(accuracy):.2f} %, "
                f"AUC {auc:.3f}"
            )
    return StudyResult(
        "sparse",
        config,
        summarize(values, {m: _cost(m, config) for m in methods}, baseline=methods[0]),
        time.perf_counter() - begun,
        loaded.files,
        {
            "losses.csv": partial(_write_losses, found),
            "weights.csv": lambda path: write_csv(
                path, ["method", "seed", "auc", "weights_not_1"], weighed
            ),
            "losses.png": partial(_draw, found, config),
        },
    )


def _rows(batch: DataBatch) -> DataBatch:
    """Images as rows, and their labels."""
    images = jnp.asarray(batch.inputs, jnp.float32)
    return DataBatch(images.reshape(len(images), -1), jnp.asarray(batch.targets))


def _scores(w: Any, data: DataBatch) -> jax.Array:
    return jnp.asarray(data.inputs) @ w["w"] + w["b"]


def _losses(w: Any, data: DataBatch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(_scores(w, data), data.targets)


def _zeros(data: DataBatch) -> dict[str, jax.Array]:
    return {"w": jnp.zeros((jnp.shape(data.inputs)[1], CLASSES)), "b": jnp.zeros(CLASSES)}


def _problem(train: DataBatch, val: DataBatch) -> BilevelProblem:
    """Batches are ignored: every step sees all examples."""

    def train_loss(w, lam, batch):
        del batch
        return jnp.mean(lam * _losses(w, train))

    def val_loss(w, lam, batch):
        del lam, batch
        return jnp.mean(_losses(w, val))

    return BilevelProblem(from_optax(train_loss, optax.sgd(RATE, MOMENTUM)), val_loss)


def _outer(method: str) -> OuterOptimizer:
    bounded = followed_by(optax.adam(OUTER_RATE), lambda lam: jnp.clip(lam, 0, 1))
    part = PARTS[method]
    return bounded if part is None else top_k(bounded, part, score="progress")


def _updates(method: str, config: Config) -> int:
    return round(config.dense_updates / (PARTS[method] or 1))


def _evaluations(config: Config) -> float:
    """Of one update, in gradients."""
    return as_gradients(reverse(config.steps).cost(config.steps, config.train_size))


def _trials(config: Config) -> int:
    """As many trainings as have the gradients of the dense updates."""
    return round(config.dense_updates * _evaluations(config) / config.steps)


def _by_hypergradients(
    method: str, config: Config, train: DataBatch, val: DataBatch, seed: int
) -> Found:
    del seed  # nothing is drawn
    updates = _updates(method, config)
    weights, val_loss = _updated(method, config.steps, updates, train, val)
    count = 1 + np.arange(updates)
    moved, evaluations = (PARTS[method] or 1) * count, _evaluations(config) * count
    return Found(moved, evaluations, np.asarray(val_loss), np.asarray(weights))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _updated(
    method: str, T: int, updates: int, train: DataBatch, val: DataBatch
) -> tuple[jax.Array, jax.Array]:
    """The weights at the end, and the validation loss before each update."""
    problem, estimator, outer = _problem(train, val), reverse(T), _outer(method)
    lam = jnp.ones(jnp.shape(train.targets))
    state = init_state(problem, estimator, outer, _zeros(train), lam)
    unseen = np.zeros((updates, T), np.float32)
    state, losses = run_episodes(
        estimator,
        outer,
        problem,
        state,
        Window(unseen, unseen),
        lr_reptile=0.0,
        observe=lambda state: state.metadata["val_loss"],
    )
    return state.hyperparams, losses


def _by_search(method: str, config: Config, train: DataBatch, val: DataBatch, seed: int) -> Found:
    n, trials = config.train_size, _trials(config)

    def suggest(trial: Any) -> dict[str, float]:
        return {f"{i}": trial.suggest_float(f"{i}", 0.0, 1.0) for i in range(n)}

    def weights(setting: dict[str, float]) -> np.ndarray:
        return np.array([setting[f"{i}"] for i in range(n)], np.float32)

    def judge(setting: dict[str, float]) -> float:
        return float(_judged(config.steps, weights(setting), train, val)[0])

    got = search(method, suggest, judge, trials, seed, {f"{i}": 1.0 for i in range(n)})
    count = 1 + np.arange(trials)
    best = np.minimum.accumulate(got.values)
    return Found(count, config.steps * count, best, weights(got.best))


@partial(jax.jit, static_argnums=0)
def _judged(T: int, lam: Any, train: DataBatch, data: DataBatch) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy after training with these weights."""
    dynamics, start = _problem(train, data).dynamics, _zeros(train)
    w = roll(dynamics, dynamics.init(start, lam), lam, np.zeros(T, np.float32)).params
    return jnp.mean(_losses(w, data)), jnp.mean(_scores(w, data).argmax(-1) == data.targets)


def _cost(method: str, config: Config) -> tuple[float, float]:
    """Gradient evaluations and second-order products of one run."""
    if method in STUDIED:
        return _trials(config) * config.steps, 0
    episodes = _updates(method, config)
    return reverse(config.steps).cost(config.steps, config.train_size, episodes=episodes)


def _write_losses(found: dict[str, list[Found]], path: Path) -> None:
    """A row for each update, and for each trial."""
    table = [
        [name, seed, *row]
        for name, runs in found.items()
        for seed, each in enumerate(runs)
        for row in zip(each.moved, each.evaluations, each.val_loss, strict=True)
    ]
    write_csv(path, ["method", "seed", "moved", "evaluations", "val_loss"], table)


def _draw(found: dict[str, list[Found]], config: Config, path: Path) -> None:
    """Validation losses over weights moved, and over gradients."""
    figure = new_figure(10, 3.8)
    panels = figure.subfigures(1, 2, squeeze=False).ravel()
    title = f"{config.dataset}, {100 * config.label_noise:g} % of the labels random"
    for panel, axis, label in zip(
        panels,
        ("moved", "evaluations"),
        ("weights moved, in units of all", "gradients of the training loss"),
        strict=True,
    ):
        axes = new_axes(panel, title, label, "validation loss" if axis == "moved" else "")
        axes.set_xscale("log")
        lines = {
            name: Line(getattr(runs[0], axis), np.mean([each.val_loss for each in runs], 0))
            for name, runs in found.items()
            if axis != "moved" or name not in STUDIED
        }
        draw_lines(axes, lines)
    save(figure, path)
