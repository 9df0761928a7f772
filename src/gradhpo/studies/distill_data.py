"""Data distillation: ten images, one per class, learned as hyperparameters.

Logistic regression is trained for 20 steps on nothing but these ten images; their 7840 pixels
and the log of one L2 penalty follow the exact hypergradient of the loss on 10 000 real images.

Source:
    Maclaurin, Duvenaud & Adams (2015), section 3.3, figure 9: plain gradient steps of 1, 40
    meta-iterations, from pixels of standard deviation 0.01. Read from the figure: validation
    loss 0.43, test loss 0.50, final training loss 0.75.
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
    draw_weights,
    learn,
    note_of,
    rows,
    started,
)
from gradhpo.transforms import reversible_sgd

__all__ = ["Config", "run"]

LAYERS = (784, CLASSES)
STEPS, RATE, MOMENTUM, LOG_SCALE = 20, 1.0, 0.9, -4.0
META_RATE = 1.0
TEST = 1000


@dataclass(frozen=True)
class Config(ReversibleConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().iterations
    40
    """

    out: Path = Path("results/distill_data")
    iterations: int = 40
    """Meta-iterations."""
    examples: int = 10_000
    """Real images that the learned ones are judged by."""

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("initial", "learned")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(iterations=1)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `images.png`, the images of the first seed, and `loss.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, seeds=min(config.seeds, 2), examples=min(config.examples, 1000))
    loaded = datasets.load(config.dataset, config.data_dir)
    data = rows(loaded, 1, config.examples, TEST)
    losses, images = [], []
    for seed in range(config.seeds):
        how = config.iterations, data, jax.random.key(seed)
        found, pixels, discarded = once(f"seed {seed}", _learn, *how)
        losses.append(np.asarray(found, np.float64))
        images.append(np.asarray(pixels))
        train, val, test = losses[-1][-1]
        progress(
            f"distill_data: {config.dataset}, seed {seed}: validation loss {val:.3f}, test loss "
            f"{test:.3f}, training loss {train:.3f}{note_of(discarded)}"
        )
    curves = np.array(losses)
    values = {"initial": by_part(curves[:, 0]), "learned": by_part(curves[:, -1])}
    for i, metric in enumerate(values["initial"]):
        values["learned"][f"{metric}_by_epoch"] = curves[:, 1:, i]
    costs = {"initial": (STEPS, 0), "learned": cost(config.iterations, STEPS)}
    files = {
        "images.png": lambda path: plots.images(
            images[0].reshape(2, 5, 28, 28), path, list(map(str, range(10)))
        ),
        "loss.png": lambda path: plots.curves(
            {name: curves[:, :, i] for i, name in enumerate(("training", "validation", "test"))},
            path,
            "meta-iterations + 1",
            "loss after training on the ten images",
            f"{config.dataset}, {config.seeds} seed{'s' * (config.seeds != 1)}",
            band=config.seeds > 2,
        ),
    }
    return StudyResult(
        "distill_data",
        config,
        summarize(values, costs, baseline="initial"),
        time.perf_counter() - begun,
        loaded.files,
        files,
    )


def _train_loss(params, lam, batch):
    penalty = jnp.exp(lam["log_l2"]) * sum(jnp.sum(x**2) for x in params)
    return cross_entropy(params, (lam["pixels"], jnp.arange(CLASSES))) + penalty


def _problem(data: Rows) -> BilevelProblem:
    def outer_loss(params, lam, batch):
        del batch
        on_images, on_test = _train_loss(params, lam, None), cross_entropy(params, data.test)
        return cross_entropy(params, data.val), {"images": on_images, "test": on_test}

    def begin(params, lam, key):
        del params, lam
        # Every step is on all ten images, which are hyperparameters: the batches say nothing.
        return started(draw_weights(key, LAYERS, LOG_SCALE), jnp.zeros(STEPS))

    dynamics = from_optax(_train_loss, lambda lam: reversible_sgd(RATE, MOMENTUM))
    return BilevelProblem(dynamics, outer_loss, begin=begin)


@functools.partial(jax.jit, static_argnums=0)
def _learn(iterations: int, data: Rows, key: jax.Array):
    """`(losses (1 + iterations, parts), pixels, discarded hypergradients)`."""
    draw_pixels, key = jax.random.split(key)
    lam = {
        "pixels": 0.01 * jax.random.normal(draw_pixels, (CLASSES, LAYERS[0])),
        "log_l2": jnp.log(0.01),
    }

    def observe(state):
        losses = [state.metadata[name] for name in ("val_images", "val_loss", "val_test")]
        return jnp.stack(losses), state.hyperparams["pixels"]

    keys = jax.random.split(key, iterations + 1)
    state, (losses, pixels) = learn(_problem(data), lam, keys, descent(META_RATE), observe)
    return losses, pixels[-2], state.metadata["n_rejected"]  # the last update is judged by no run
