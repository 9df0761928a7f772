"""One L2 penalty for each of the 7850 weights of logistic regression, drawn as an image.

Weights are trained for 50 steps of 200 examples; the log penalties follow the exact
hypergradient of the loss on 10 000 validation examples. The baseline `single` has one penalty
for all weights: the best, for each seed and by validation loss, of a grid of ten.

Source:
    Maclaurin, Duvenaud & Adams (2015), section 3.2, figure 8: plain gradient steps of 1000, 50
    meta-iterations, from penalties 0.01 e, with 0.01 ||exp(lam)||^2 added to the outer loss.
"""

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.outer import descent
from gradhpo.core.problem import BilevelProblem
from gradhpo.report import StudyResult, plots, summarize
from gradhpo.report.config import Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.shared.reversible import (
    CLASSES,
    ReversibleConfig,
    Rows,
    by_part,
    cost,
    cross_entropy,
    draw,
    learn,
    note_of,
    on_all,
    on_rows,
    rows,
    started,
    trained,
)
from gradhpo.transforms import reversible_sgd

__all__ = ["Config", "run"]

LAYERS = (784, CLASSES)
STEPS, BATCH, RATE, MOMENTUM, LOG_SCALE = 50, 200, 1.0, 0.9, -4.0
META_RATE, META_PENALTY, START = 1000.0, 0.01, np.log(0.01) + 1
GRID = np.geomspace(1e-5, 1e-1, 10)  # single penalties
FRESH = 5  # runs that a penalty is judged on


@dataclass(frozen=True)
class Config(ReversibleConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().iterations
    50
    """

    out: Path = Path("results/regularisation_map")
    iterations: int = 50
    """Meta-iterations."""

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("single", "learned")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(iterations=1)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `penalties.png`, the map of each class, and `loss.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(
            config,
            seeds=min(config.seeds, 2),
            iterations=min(config.iterations, 10),
            examples=min(config.examples, 2000),
        )
    loaded = datasets.load(config.dataset, config.data_dir)
    data = rows(loaded, *(config.examples,) * 3)
    single, learned, curves, maps = [], [], [], []
    for seed in range(config.seeds):
        how = config.iterations, data, jax.random.key(seed)
        lam, losses, discarded = once(f"seed {seed}", _learn, *how)
        fresh = jax.random.split(jax.random.key(1_000_000 + seed), FRESH)
        grid = once(f"seed {seed}, single penalties", _on_grid, data, fresh)
        best = int(np.argmin([losses[1] for losses in grid]))
        single.append(grid[best])
        learned.append(once(f"seed {seed}, judged", _judge, data, lam, fresh))
        curves.append(np.asarray(losses, np.float64))
        maps.append(lam[0])
        progress(
            f"regularisation_map: {config.dataset}, seed {seed}: validation loss "
            f"{learned[-1][1]:.4f}, best single penalty {GRID[best]:.1e}: {single[-1][1]:.4f}"
            f"{note_of(discarded)}"
        )
    values = {"single": by_part(single), "learned": by_part(learned)}
    values["learned"]["val_loss_by_epoch"] = np.array(curves)
    costs = {"single": (len(GRID) * STEPS, 0), "learned": cost(config.iterations, STEPS)}
    pictures = np.mean(maps, axis=0).T.reshape(2, 5, 28, 28)
    files = {
        "penalties.png": lambda path: plots.images(pictures, path, list(map(str, range(10)))),
        "loss.png": lambda path: plots.curves(
            {"learned": np.array(curves)},
            path,
            "meta-iteration",
            "validation loss",
            f"{config.dataset}, {config.seeds} seed{'s' * (config.seeds != 1)}",
            band=config.seeds > 2,
        ),
    }
    return StudyResult(
        "regularisation_map",
        config,
        summarize(values, costs, baseline="single"),
        time.perf_counter() - begun,
        loaded.files,
        files,
    )


def _everywhere(value: float) -> list[jax.Array]:
    """The same log penalty for every weight and bias."""
    return [jnp.full(LAYERS, value, jnp.float32), jnp.full(CLASSES, value, jnp.float32)]


def _problem(data: Rows) -> BilevelProblem:
    loss, judge = on_rows(data.train), on_all(data.val)

    def train_loss(params, lam, index):
        penalty = sum(jnp.sum(jnp.exp(x) * w**2) for x, w in zip(lam, params, strict=True))
        return loss(params, lam, index) + penalty

    def penalised(params, lam, batch):
        penalty = sum(jnp.sum(jnp.exp(2 * x)) for x in lam)
        return judge(params, lam, batch) + META_PENALTY * penalty

    def begin(params, lam, key):
        del params, lam
        return started(*draw(key, LAYERS, LOG_SCALE, (STEPS, BATCH), len(data.train.targets)))

    dynamics = from_optax(train_loss, lambda lam: reversible_sgd(RATE, MOMENTUM))
    return BilevelProblem(dynamics, penalised, begin=begin)


@functools.partial(jax.jit, static_argnums=0)
def _learn(iterations: int, data: Rows, key: jax.Array):
    """`(penalties, validation losses, discarded hypergradients)`."""
    keys = jax.random.split(key, iterations)
    observe = lambda state: cross_entropy(state.params, data.val)  # noqa: E731
    state, losses = learn(_problem(data), _everywhere(START), keys, descent(META_RATE), observe)
    return state.hyperparams, losses, state.metadata["n_rejected"]


@jax.jit
def _losses(data: Rows, lam: list[jax.Array], keys: jax.Array) -> jax.Array:
    problem = _problem(data)

    def losses(key):
        params = trained(problem, lam, key)
        return jnp.stack([cross_entropy(params, part) for part in data])

    return jax.lax.map(losses, keys).mean(0)


def _on_grid(data: Rows, keys: jax.Array) -> list[np.ndarray]:
    return [_judge(data, _everywhere(np.log(x)), keys) for x in GRID]


def _judge(data: Rows, lam: list[jax.Array], keys: jax.Array) -> np.ndarray:
    """Mean losses, without penalties, over fresh runs: training, validation, test."""
    return np.asarray(_losses(data, lam, keys), np.float64)
