"""The run of the study: settings, rates, curves, files."""

import csv
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.loop import fetch, in_windows
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.f2sa import f2sa
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.linear_solvers import cg
from gradhpo.estimators.saba import saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.report import StudyResult, interval, summarize
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.drawing import COLORS, label_ends, new_axes, new_figure, save
from gradhpo.studies.single_loop.problem import (
    Exact,
    Split,
    cut,
    exact,
    logistic,
    split,
    train_loss,
    val_loss,
)

__all__ = ["Config", "run"]

STEPS = 10  # of the methods with a window, on the weights and on the linear system alike
PRODUCT = 2  # gradients that a second-order product counts as
POINTS = 20  # of a curve
TUNING_SEEDS = (1000, 1001, 1002, 1003, 1004)
INNER_RATES = (0.05, 0.1, 0.2)
OUTER_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
GRID = tuple(itertools.product(INNER_RATES, OUTER_RATES))


class Entry(NamedTuple):
    """A method of this study and its price per outer update."""

    make: Callable[[Any, int, int], Estimator]  # (inner rate, parts of train, of val)
    window: int
    gradients: int
    products: int


METHODS = {
    "soba": Entry(lambda rate, n, m: soba(rate), 1, 2, 1),
    "saba": Entry(lambda rate, n, m: saba(n, m, rate), 1, 2, 1),
    "amigo": Entry(lambda rate, n, m: amigo(STEPS, STEPS, rate), STEPS, STEPS + 1, STEPS + 1),
    "stocbio": Entry(lambda rate, n, m: stocbio(STEPS, STEPS, rate), STEPS, STEPS + 1, STEPS + 1),
    "f2sa": Entry(lambda rate, n, m: f2sa(STEPS), STEPS, 3 * STEPS + 3, 0),
    "implicit_cg": Entry(
        lambda rate, n, m: implicit(STEPS, cg(max_iterations=STEPS)), STEPS, STEPS + 2, STEPS + 3
    ),
}

RATES: dict[str, dict[str, tuple[float, float]]] = {
    "ijcnn1": {
        "soba": (0.2, 1.0),
        "saba": (0.2, 1.0),
        "amigo": (0.2, 10.0),
        "stocbio": (0.1, 30.0),
        "f2sa": (0.2, 10.0),
        "implicit_cg": (0.1, 3.0),
    }
}


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
        for name, least in (("batch_size", 1), ("budget", 35 * POINTS)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


class Curve(NamedTuple):
    """One run, at the start and at every point after."""

    seconds: np.ndarray
    hypergrad_norm: np.ndarray
    value: np.ndarray  # L_val of the weights that are best for lam
    current: np.ndarray  # L_val of the weights that the method has
    last: Exact


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run every method; its files are `points.csv`, `hypergradient.png` and `validation.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, seeds=min(config.seeds, 2), budget=min(config.budget, 20_000))
    loaded = datasets.load(config.dataset, config.data_dir)
    data = split(loaded)
    methods = config.method or tuple(METHODS)
    start = exact(data, np.zeros(data.train.inputs.shape[1]))
    rates = {m: _rates(m, data, start, config, progress) for m in methods}
    curves: dict[str, list[Curve]] = {m: [] for m in methods}
    for seed, method in itertools.product(range(config.seeds), methods):
        curve = _run(method, rates[method], data, start, config, seed, POINTS)
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
    costs = {m: _cost(m, config) for m in methods}
    norm, value = "norm of the exact hypergradient", "validation loss at the minimum"
    files = {
        "points.csv": lambda path: _write(curves, config, path),
        "hypergradient.png": lambda path: _draw(curves, "hypergrad_norm", config, path, norm),
        "validation.png": lambda path: _draw(curves, "value", config, path, value),
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
        worst = -np.inf
        for seed in TUNING_SEEDS:
            value = _run(method, rates, data, start, config, seed, 1).last.value
            worst = max(worst, value if np.isfinite(value) else np.inf)
            if worst >= start.value:
                break  # diverged
        found[rates] = worst
    best = min(found, key=found.__getitem__)
    progress(
        f"single_loop: {config.dataset}, {method}: inner and outer rate {best}, validation loss "
        f"{found[best]:.4f}"
    )
    return best


def _run(
    method: str,
    rates: tuple[float, float],
    data: Split,
    start: Exact,
    config: Config,
    seed: int,
    points: int,
) -> Curve:
    """One method from weights 0 and lam 0; the clock stops at every point and runs on after it."""
    resident = cut(data, config.batch_size, seed)
    sizes = [len(side["index"]) for side in resident]
    steps = _steps(method, config, points)
    longest = max(_steps(m, config, points) for m in METHODS) * points
    draws = np.random.default_rng((seed, 1)).integers(0, sizes, (longest, 2), dtype=np.int32)
    zeros = jnp.zeros(data.train.inputs.shape[1])
    rate = tuple(jnp.asarray(r, jnp.float32) for r in rates)

    def segment(state, k):
        part = Window(*jnp.asarray(draws[k * steps : (k + 1) * steps].T))
        return jax.block_until_ready(_segment(method, state, part, resident, rate))

    state = _initial(method, zeros, *sizes)
    if points > 1:  # a curve is wanted, and its times
        segment(state, 0)  # compiles
    found, states, seconds = [start], [state], [0.0]
    for k in range(points):
        begun = time.perf_counter()
        state = segment(state, k)
        seconds.append(seconds[-1] + time.perf_counter() - begun)
        states.append(state)
        found.append(_exact(data, state, found[-1]))
    return Curve(
        np.array(seconds),
        np.array([np.linalg.norm(x.hypergrad) for x in found]),
        np.array([x.value for x in found]),
        np.array([float(logistic(s.params, *data.val)) for s in states]),
        found[-1],
    )


def _problem(inner_rate: Any) -> BilevelProblem:
    return BilevelProblem(from_optax(train_loss, optax.sgd(inner_rate)), val_loss)


def _initial(method: str, zeros: jax.Array, n: int, m: int) -> BilevelState:
    estimator = METHODS[method].make(0.1, n, m)
    return init_state(_problem(0.1), estimator, optax.sgd(0.1), zeros, zeros)


@partial(jax.jit, static_argnums=0)
def _segment(
    method: str, state: BilevelState, draws: Window, resident: Window, rates: Any
) -> BilevelState:
    """Some outer updates in a row; the rates are arguments, so one program serves the grid."""
    inner_rate, outer_rate = rates
    estimator = METHODS[method].make(inner_rate, *(len(side["index"]) for side in resident))
    step = bilevel_step(estimator, optax.sgd(outer_rate))

    def body(state, window):
        return step(_problem(inner_rate), state, fetch(resident, window)), None

    return lax.scan(body, state, in_windows(draws, estimator.window))[0]


def _exact(data: Split, state: BilevelState, before: Exact) -> Exact:
    """The exact answer at lam, or NaN where the run has diverged."""
    lam = np.asarray(state.hyperparams)
    if int(state.metadata["n_rejected"]) or not np.all(np.abs(lam) < 50):
        nan = np.full(len(lam), np.nan)
        return Exact(nan, nan, float("nan"))
    return exact(data, lam, before.weights)


def _steps(method: str, config: Config, points: int) -> int:
    """Inner steps of one segment: the same budget for all, in whole windows."""
    entry = METHODS[method]
    updates = config.budget / points / (entry.gradients + PRODUCT * entry.products)
    return round(updates) * entry.window


def _cost(method: str, config: Config) -> tuple[int, int]:
    """Gradient evaluations and second-order products of a run (of `cg`, at most)."""
    entry = METHODS[method]
    updates = _steps(method, config, POINTS) // entry.window * POINTS
    return updates * entry.gradients, updates * entry.products


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


def _write(curves: dict[str, list[Curve]], config: Config, path: Path) -> None:
    """A row per method, seed and point."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = ("seconds", "hypergrad_norm", "value", "current")
        writer.writerow(["method", "seed", "gradients", "products", *fields])
        for method, each in curves.items():
            total = np.array(_cost(method, config))
            for seed, curve in enumerate(each):
                for k, row in enumerate(zip(*curve[:4], strict=True)):
                    spent = (total * k // POINTS).tolist()
                    writer.writerow([method, seed, *spent, *map(float, row)])


def _draw(
    curves: dict[str, list[Curve]], field: str, config: Config, path: Path, label: str
) -> None:
    """Mean over seeds with its 95 % interval, against the budget and against the clock."""
    figure = new_figure(10.4, 4.0)
    left, right = figure.subfigures(1, 2, squeeze=False).ravel()
    title = f"{config.dataset}, {config.seeds} seed{'s' * (config.seeds != 1)}"
    for panel, xlabel, heading in (
        (left, "thousand gradient evaluations (a product counts as 2)", title),
        (right, "seconds, without compilation", ""),
    ):
        axes = new_axes(panel, heading, xlabel, label)
        axes.set_yscale("log", nonpositive="mask")
        ends = []
        for color, (method, each) in zip(COLORS, curves.items(), strict=False):
            summary = interval(np.array([getattr(curve, field) for curve in each]))
            mean, (low, high) = summary.mean, summary.ci95
            x = np.linspace(0, config.budget / 1000, POINTS + 1)
            if panel is right:
                x = np.mean([curve.seconds for curve in each], axis=0)
            axes.plot(x, mean, linewidth=1.8, color=color)
            if len(each) > 2:
                low = np.maximum(low, mean / 10)
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            end = np.flatnonzero(np.isfinite(mean))[-1:]
            ends.append((method, color, x[end], mean[end]))
        axes.margins(x=0)
        label_ends(axes, ends)
    save(figure, path)
