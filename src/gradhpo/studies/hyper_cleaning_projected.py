"""Hyper-cleaning with a budget: weights in [0, 1] that may add up to R, softmax regression.

Half of the training labels are replaced by other classes. The weights of the n examples start at
R / n; after T steps of full-batch gradient descent from 0 on

    (1/n) sum_i lam_i loss_i(w),    rate 0.1 n / R

they follow the exact hypergradient of the loss on clean examples, by Adam and a projection onto
{0 <= lam <= 1, sum lam <= R}. An example whose weight ends below 1/1000 is taken as wrong: what is
scored is the F1 of that, and the test accuracy after training anew on all others and the clean
examples. Beside it: training on everything (`all`), and without the wrong examples (`oracle`).

Source:
    Franceschi et al. (2017), "Forward and Reverse Gradient-Based Hyperparameter Optimization",
    section 5.1. Theirs are 5000 + 5000 examples, R of 1000, 1500, 2000 and 2500, an outer rate of
    0.005, T up to 4000 and 500 updates; the defaults are smaller, with a larger rate.
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
from jax import lax

from gradhpo import datasets, spaces
from gradhpo.core.dynamics import from_optax
from gradhpo.core.loop import run_episodes
from gradhpo.core.outer import followed_by
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.step import init_state
from gradhpo.core.types import DataBatch
from gradhpo.estimators.reverse import reverse
from gradhpo.report import StudyResult, plots, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.shared.cells import ends
from gradhpo.studies.shared.detection import detection

__all__ = ["Config", "run"]

NOISE, RATE, CLASSES = 0.5, 0.1, 10
SMALL = 1e-3  # a weight below this one marks a wrong label
RETRAINING = 300  # steps, with momentum 0.9


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().budget
    (0.2, 0.3, 0.4, 0.5)
    """

    out: Path = Path("results/hyper_cleaning_projected")
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    """Data set; digits come with scikit-learn (and are 1797 images: give smaller sizes)."""
    seeds: int = 2
    """Number of repetitions with different seeds."""
    train_size: int = 2000
    """Training examples n; 5000 in the paper."""
    val_size: int = 2000
    """Clean examples; 5000 in the paper."""
    budget: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5)
    """R / n, a run with each."""
    steps: int = 100
    """Training steps T; 1000 to 4000 in the paper."""
    updates: int = 80
    """Updates of the weights of the examples; 500 in the paper."""
    outer_rate: float = 0.02
    """Rate of Adam; 0.005 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=2, val_size=1, steps=1, updates=1)
        if not self.budget or not all(0 < part <= 1 for part in self.budget):
            raise ValueError(f"budget must be numbers above 0 and up to 1, not {self.budget}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("all", "oracle", "cleaned")


class Cleaned(NamedTuple):
    """One run; arrays over the updates."""

    weights: np.ndarray  # (updates, n)
    val_loss: np.ndarray


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `detection.csv` and `f1.png`."""
    begun = time.perf_counter()
    if config.fast:
        most = {"train_size": 500, "val_size": 500, "steps": 50, "updates": 60}
        smaller = {name: min(getattr(config, name), n) for name, n in most.items()}
        config = replace(config, budget=config.budget[-2:], **smaller)
    loaded = datasets.load(config.dataset, config.data_dir)
    values: dict[str, dict[str, list[Any]]] = {"all": {}, "oracle": {}}
    scores: dict[str, list[tuple[float, float]]] = {}
    curves: dict[str, list[list[float]]] = {}
    for seed in range(config.seeds):
        train, val, test, wrong = _parts(loaded, config, seed)
        kept = {"all": np.ones(len(wrong)), "oracle": 1.0 - wrong}
        for part in config.budget:
            name = f"R={round(part * config.train_size)}"
            budget = part * config.train_size
            found = once(
                f"seed {seed}, {part}", _clean, config, budget, train, val, types=(Cleaned,)
            )
            kept[name] = (found.weights[-1] >= SMALL).astype(float)
            seen = [detection(weights, wrong, SMALL) for weights in found.weights]
            scores.setdefault(name, []).append((seen[-1].f1, seen[-1].auc))
            curves.setdefault(name, []).append([each.f1 for each in seen])
            values.setdefault(name, {}).setdefault("val_loss_by_epoch", []).append(found.val_loss)
        for name, rows in kept.items():
            part = f"seed {seed}, {name}, trained again"
            accuracy = float(once(part, _retrained, rows, train, val, test))
            values[name].setdefault("test_accuracy", []).append(accuracy)
            f1 = f", F1 {scores[name][-1][0]:.3f}" if name in scores else ""
            told = (
                f"hyper_cleaning_projected: {config.dataset}, seed {seed}, {name}: test accuracy "
            )
            progress(f"{told}{100 * accuracy:.2f} %{f1}")
    for name, pairs in scores.items():
        mean, low, high = ends([f1 for f1, _ in pairs])
        progress(f"hyper_cleaning_projected: {name}: F1 {mean:.3f} [{low:.3f}, {high:.3f}]")
    costs = dict.fromkeys(values, (RETRAINING, 0))
    cost = reverse(config.steps).cost(config.steps, config.train_size, episodes=config.updates)
    table = [[name, i, *pair] for name, pairs in scores.items() for i, pair in enumerate(pairs)]
    title = f"{config.dataset}, {100 * NOISE:g} % of the labels wrong"
    return StudyResult(
        "hyper_cleaning_projected",
        config,
        summarize(values, costs | dict.fromkeys(scores, cost), baseline="all"),
        time.perf_counter() - begun,
        loaded.files,
        {
            "detection.csv": lambda path: write_csv(path, ["budget", "seed", "f1", "auc"], table),
            "f1.png": lambda path: plots.curves(
                curves,
                path,
                "updates",
                "F1 of small weights",
                title,
                band=config.seeds > 2,
                within=(0, 1),
            ),
        },
    )


def _parts(
    data: datasets.Dataset, config: Config, seed: int
) -> tuple[DataBatch, DataBatch, DataBatch, np.ndarray]:
    """Training examples with wrong labels, clean ones and test examples, and which are wrong."""
    sizes = [config.train_size, config.val_size]
    if data.test is None:
        sizes.append(len(data.train.targets) - sum(sizes))
    train, val, *rest = datasets.split(data.train, sizes, seed)
    noisy, wrong = datasets.corrupt_labels(seed, train.targets, NOISE, CLASSES, "different")
    clean, judged, tested = (
        DataBatch(jnp.asarray(images).reshape(len(labels), -1), jnp.asarray(labels))
        for images, labels in (train, val, data.test or rest[0])
    )
    return clean._replace(targets=jnp.asarray(noisy)), judged, tested, wrong


def _scores(w: Any, data: DataBatch) -> jax.Array:
    return jnp.asarray(data.inputs) @ w["w"] + w["b"]


def _losses(w: Any, data: DataBatch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(_scores(w, data), data.targets)


def _zeros(data: DataBatch) -> dict[str, jax.Array]:
    return {"w": jnp.zeros((data.inputs.shape[1], CLASSES)), "b": jnp.zeros(CLASSES)}


def _clean(config: Config, budget: float, train: DataBatch, val: DataBatch) -> Cleaned:
    made = _updated(config.steps, config.updates, config.outer_rate, budget, train, val)
    return Cleaned(*map(np.asarray, made))


@partial(jax.jit, static_argnums=(0, 1))
def _updated(
    T: int, updates: int, outer_rate: Any, budget: Any, train: DataBatch, val: DataBatch
) -> tuple[jax.Array, jax.Array]:
    """The weights after each update, and the validation loss before it."""
    n = len(train.targets)

    def train_loss(w, lam, batch):
        del batch  # every step sees all examples
        return jnp.mean(lam * _losses(w, train))

    def val_loss(w, lam, batch):
        del lam, batch
        return jnp.mean(_losses(w, val))

    dynamics = from_optax(train_loss, optax.sgd(RATE * n / budget))
    problem = BilevelProblem(dynamics, val_loss)
    outer = followed_by(optax.adam(outer_rate), lambda lam: spaces.budget(lam, budget))
    lam = jnp.full(n, budget / n)
    state = init_state(problem, reverse(T), outer, _zeros(train), lam)
    unseen = np.zeros((updates, T), np.float32)
    return run_episodes(
        reverse(T),
        outer,
        problem,
        state,
        Window(unseen, unseen),
        lr_reptile=0.0,  # every episode starts from 0 again
        observe=lambda state: (state.hyperparams, state.metadata["val_loss"]),
    )[1]


@jax.jit
def _retrained(kept: jax.Array, train: DataBatch, val: DataBatch, test: DataBatch) -> jax.Array:
    """Test accuracy after training on the examples with weight 1 and on the clean ones."""
    weights = jnp.concatenate([kept, jnp.ones(len(val.targets))])
    both = DataBatch(*(jnp.concatenate(pair) for pair in zip(train, val, strict=True)))
    optimizer = optax.sgd(RATE, momentum=0.9)

    def step(state, _):
        w, slots = state
        slope = jax.grad(lambda w: jnp.sum(weights * _losses(w, both)) / jnp.sum(weights))(w)
        updates, slots = optimizer.update(slope, slots)
        return (optax.apply_updates(w, updates), slots), None

    start = _zeros(train)
    (w, _), _ = lax.scan(step, (start, optimizer.init(start)), length=RETRAINING)
    return jnp.mean(_scores(w, test).argmax(-1) == test.targets)
