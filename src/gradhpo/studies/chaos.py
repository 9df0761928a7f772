"""Chaos: where the learning rate is so high that its own hypergradient explodes.

A network 784-200-50-10 of tanh units is trained for 50 steps with one learning rate, from the
same weights and on the same batches; the rate is swept. Shown are the training loss at the end
and the exact derivative of that loss with respect to the log rate, by reversal.

Source:
    Maclaurin, Duvenaud & Adams (2015), section 4, figure 11. Its losses are reproduced with
    pixels in [0, 1], the mean image left in, and batches taken in turn. With centred pixels
    chaos sets in at higher rates; with batches drawn at random the losses are higher.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.status import Status
from gradhpo.estimators.reversible import reversible_gradients
from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import Progress, silent
from gradhpo.report.drawing import COLORS, new_axes, new_figure, save
from gradhpo.report.parts import once
from gradhpo.studies.shared.reversible import (
    ReversibleConfig,
    Rows,
    cost,
    draw_weights,
    on_all,
    on_rows,
    rows,
)
from gradhpo.transforms import reversible_sgd

__all__ = ["Config", "run"]

LAYERS = (784, 200, 50, 10)
STEPS, BATCH, MOMENTUM, LOG_SCALE = 50, 250, 0.9, -2.0
LOW, HIGH = 0.5, 2.5  # log learning rates
TOLD = {0.5: 0.0288, 1.1: 0.0078, 1.66: 0.0024}  # losses read from the published figure
TOGETHER = 20  # rates of one call


@dataclass(frozen=True)
class Config(ReversibleConfig):
    """Settings of the study; one seed is the published figure.

    Raises:
        ValueError: a number is out of range.

    >>> Config().points
    100
    """

    out: Path = Path("results/chaos")
    seeds: int = 1
    points: int = 100
    """Learning rates; the published figure has 1000."""
    examples: int = 1000
    """Training examples."""

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("lower half", "upper half")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(points=2)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `chaos.csv` and `chaos.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, points=min(config.points, 20), seeds=1)
    loaded = datasets.load(config.dataset, config.data_dir)
    data = rows(loaded, config.examples, 0, 0, centred=False)
    rates = np.linspace(LOW, HIGH, config.points)
    losses, slopes = [], []
    for seed in range(config.seeds):
        loss, slope = (np.concatenate(x) for x in zip(*_sweep(data, rates, seed), strict=True))
        losses.append(loss)
        slopes.append(slope)
        half = config.points // 2
        low, high = (np.nanmax(np.abs(x)) for x in (slope[:half], slope[half:]))
        progress(
            f"chaos: {config.dataset}, seed {seed}: largest |dL/dlog rate| {low:.3g} in the lower "
            f"half, {high:.3g} in the upper; {np.isnan(slope).sum()} discarded; loss "
            + ", ".join(
                f"{loss[np.argmin(np.abs(rates - x))]:.4f} at {x} (published {y})"
                for x, y in TOLD.items()
            )
        )
    values = {
        "lower half": {"train_loss": np.array(losses)[:, : config.points // 2].min(axis=1)},
        "upper half": {"train_loss": np.array(losses)[:, config.points // 2 :].min(axis=1)},
    }
    costs = dict.fromkeys(values, cost(config.points // 2, STEPS))
    methods = summarize(values, costs)
    files = {
        "chaos.csv": lambda path: _write(rates, losses, slopes, path),
        "chaos.png": lambda path: _draw(rates, losses, slopes, config, path),
    }
    return StudyResult("chaos", config, methods, time.perf_counter() - begun, loaded.files, files)


def _sweep(data: Rows, rates: np.ndarray, seed: int):
    """`(losses, derivatives)` in parts; a derivative is NaN where reversal was flagged."""
    for start in range(0, len(rates), TOGETHER):
        part = jnp.asarray(rates[start : start + TOGETHER], jnp.float32)
        found = once(f"seed {seed}, rate {start}", _derive, data, part, jax.random.key(seed))
        yield tuple(np.asarray(x, np.float64) for x in found)


@jax.jit
def _derive(data: Rows, rates: jax.Array, key: jax.Array):
    dynamics = from_optax(on_rows(data.train), lambda lam: reversible_sgd(jnp.exp(lam), MOMENTUM))
    problem = BilevelProblem(dynamics, on_all(data.train))
    weights = draw_weights(key, LAYERS, LOG_SCALE)
    # Batches in turn, not drawn.
    index = jnp.arange(STEPS * BATCH).reshape(STEPS, BATCH) % len(data.train.targets)
    window = Window(index, jnp.zeros(STEPS))  # the outer loss is on all examples

    def derive(lam):
        got = reversible_gradients(problem, dynamics.init(weights, lam), lam, window)
        found = got.gradients
        loss = jnp.where(got.status == Status.OUT_OF_RANGE, jnp.nan, found.val_loss)
        return loss, found.indirect

    return lax.map(derive, rates)


def _write(
    rates: np.ndarray, losses: list[np.ndarray], slopes: list[np.ndarray], path: Path
) -> None:
    table = [
        [seed, *map(float, row)]
        for seed, columns in enumerate(zip(losses, slopes, strict=True))
        for row in zip(rates, *columns, strict=True)
    ]
    write_csv(path, ["seed", "log_rate", "loss", "derivative"], table)


def _draw(
    rates: np.ndarray,
    losses: list[np.ndarray],
    slopes: list[np.ndarray],
    config: Config,
    path: Path,
) -> None:
    figure = new_figure(9.6, 3.8)
    left, right = figure.subfigures(1, 2, squeeze=False).ravel()
    for panel, title, label, columns in (
        (left, config.dataset, "training loss at the end", losses),
        (right, "", "|dL / dlog rate|", [np.abs(x) for x in slopes]),
    ):
        axes = new_axes(panel, title, "log learning rate", label)
        axes.set_yscale("log", nonpositive="mask")
        for color, column in zip(COLORS, columns, strict=False):
            axes.plot(rates, column, ".-", color=color, markersize=3, linewidth=0.8)
    save(figure, path)
