"""x"""

import csv
import functools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.status import Status
from gradhpo.estimators.reversible import reversible_gradients
from gradhpo.report import StudyResult, interval, plots, summarize
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.drawing import COLORS, INK, new_axes, new_figure, save
from gradhpo.studies.shared.reversible import (
    Rows,
    batches,
    cross_entropy,
    from_noise,
    names,
    noise,
    rows,
)
from gradhpo.transforms import reversible_sgd
from gradhpo.utils.gradients import tree_where

__all__ = ["Config", "Schedule", "optimizer", "read_schedule", "run"]

LAYERS = (784, 50, 50, 50, 10)
BATCH = 200
FRESH = 5  # seeds that a learned schedule is judged on
PAIRS = 10  # seeds of the comparison with Optax
LEAST_MOMENTUM = 0.1  # of a schedule, in the geometric mean
META = {"fast": optax.adam(0.08, b2=0.99), "published": optax.adam(0.04)}
# Read from the vector figures of the paper: final training loss at every fifth meta-iteration,
# and training loss by step with the initial and the learned schedule.
PUBLISHED = (0.483, 0.269, 0.233, 0.209, 0.192, 0.161, 0.152, 0.137, 0.121, 0.123, 0.112)
PUBLISHED_STEPS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
PUBLISHED_INITIAL = (2.302, 2.292, 2.276, 2.209, 1.911, 1.44, 1.027, 0.851, 0.74, 0.664, 0.593)
PUBLISHED_LEARNED = (2.378, 1.067, 0.531, 0.433, 0.313, 0.277, 0.219, 0.183, 0.167, 0.147, 0.138)


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study; `seeds` are meta-optimizations.

    Raises:
        ValueError: a number is out of range.

    >>> Config().meta
    'fast'
    """

    out: Path = Path("results/schedule")
    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Data set, found or downloaded."""
    meta: Literal["fast", "published"] = "fast"
    """Adam for the hyperparameters: rate 0.08 with b2 = 0.99, or rate 0.04."""
    iterations: int = 50
    """Meta-iterations."""
    steps: int = 100
    """Training steps of a run."""
    examples: int = 10_000
    """Training, validation and test examples each."""
    momentum: float = 0.5
    """Momentum at the start; the paper also has 0.9."""

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("initial", "learned")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "steps", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {self.momentum}.")


class Schedule(NamedTuple):
    """The hyperparameters, unconstrained; a column per leaf of the network."""

    log_rate: jax.Array  # (steps, 8)
    logit_momentum: jax.Array  # (steps, 8)
    log_scale: jax.Array  # (8,)


def initial(config: Config) -> Schedule:
    """Where the paper starts."""
    kinds = 2 * (len(LAYERS) - 1)
    table = (config.steps, kinds)
    logit = np.log(config.momentum / (1 - config.momentum))
    return Schedule(jnp.full(table, -1.0), jnp.full(table, logit), jnp.full(kinds, -3.0))


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study.

    Its files are `schedule.json`, the learned schedule of the meta-optimization that ended best,
    `meta_curve.csv`, `training.csv`, `meta_curve.png`, `training.png` and `schedules.png`.
    """
    begun = time.perf_counter()
    if config.fast:
        config = replace(
            config,
            seeds=min(config.seeds, 2),
            iterations=min(config.iterations, 6),
            steps=min(config.steps, 30),
            examples=min(config.examples, 1000),
        )
    loaded = datasets.load(config.dataset, config.data_dir)
    data = rows(loaded, *(config.examples,) * 3)
    start = initial(config)
    losses, best = [], []
    for seed in range(config.seeds):
        found, seen = _meta_optimize(config, data, start, seed, progress)
        losses.append(seen)
        best.append(found)
    learning = time.perf_counter() - begun
    each = 60 * config.seeds * config.iterations / learning
    progress(f"schedule: {each:.0f} meta-iterations per minute, compilation included")

    keys = [jax.random.key(1_000_000 + i) for i in range(FRESH)]
    scored = {
        "initial": [_judge(config, data, start, keys)] * config.seeds,
        "learned": [_judge(config, data, lam, keys) for lam in best],
    }
    metrics: tuple[str, ...] = ("train_loss", "val_loss", "test_loss")
    values: dict[str, dict[str, Any]] = {
        name: dict(zip(metrics, np.transpose(each), strict=True)) for name, each in scored.items()
    }
    values["learned"]["train_loss_by_epoch"] = np.array(losses)
    chosen = int(np.argmin(values["learned"]["train_loss"]))
    content = json.dumps(_plain(best[chosen]), indent=1) + "\n"
    _, schedules = _parse(content)  # Optax gets what the file holds
    taken_home = {"optax, initial": _describe(start), "optax, learned": schedules}
    pairs: dict[str, dict[str, Any]] = {
        name: dict(zip(metrics, np.transpose(_with_optax(config, data, which)), strict=True))
        for name, which in taken_home.items()
    }
    steps, updates = config.steps, config.iterations
    costs = {"initial": (steps, 0), "learned": (updates * (3 * steps + 1), updates * steps)}
    methods = summarize(values, costs, baseline="initial")
    costs = dict.fromkeys(pairs, (steps, 0))
    methods |= summarize(pairs, costs, baseline="optax, initial")
    curves = {
        "initial": _curve(config, data, start, keys[0]),
        "learned": _curve(config, data, best[chosen], keys[0]),
    }
    every = np.array(losses)
    files = {
        "schedule.json": lambda path: path.write_text(content, encoding="utf-8"),
        "meta_curve.csv": lambda path: _write_meta_curve(every, path),
        "training.csv": lambda path: _write_training(config, curves, path),
        "meta_curve.png": lambda path: _draw_meta_curve(config, every, path),
        "training.png": lambda path: _draw_training(config, curves, path),
        "schedules.png": lambda path: _draw_schedules(best[chosen], path),
    }
    told = ", ".join(f"{k} {v['train_loss'].mean():.3f}" for k, v in {**values, **pairs}.items())
    progress(f"schedule: training loss {told}")
    seconds = time.perf_counter() - begun
    return StudyResult("schedule", config, methods, seconds, loaded.files, files)


# -- one meta-optimization -------------------------------------------------------------------


def _inner(lam: Schedule):
    return reversible_sgd(
        lambda t: list(jnp.exp(lam.log_rate[t])),
        lambda t: list(jax.nn.sigmoid(lam.logit_momentum[t])),
    )


def _losses(data: Rows):
    """`(train_loss, outer_loss)`; a batch of the first is made of indices."""

    def train_loss(params, lam, index):
        return cross_entropy(params, (data.train.inputs[index], data.train.targets[index]))

    def outer_loss(params, lam, batch):
        return cross_entropy(params, batch)

    return train_loss, outer_loss


def _derive(config: Config, data: Rows, lam: Schedule, key: jax.Array):
    """`(hypergradient, status, losses)` of one training run."""
    train_loss, outer_loss = _losses(data)
    problem = BilevelProblem(from_optax(train_loss, _inner), outer_loss)
    draw_weights, draw_batches = jax.random.split(key)
    weights = from_noise(noise(draw_weights, LAYERS), lam.log_scale)
    index = batches(draw_batches, config.steps, BATCH, config.examples)
    window = Window(index, jax.tree.map(lambda x: x[None], data.train))
    got = reversible_gradients(
        problem, problem.dynamics.init(weights, lam), lam, window, least_momentum=LEAST_MOMENTUM
    )
    found = got.gradients
    # w_0 = exp(log_scale) noise
    scale = jnp.stack([jnp.vdot(g, w) for g, w in zip(found.initial.params, weights, strict=True)])
    hypergrad = optax.tree.add(found.direct, found.indirect)
    hypergrad = hypergrad._replace(log_scale=hypergrad.log_scale + scale)
    return hypergrad, got.status, found.val_loss


@functools.partial(jax.jit, static_argnums=0)
def _meta_steps(config: Config, data: Rows, state: Any, keys: jax.Array):
    """Some meta-iterations; a hypergradient that is flagged changes nothing."""

    def body(state, key):
        lam, slots, best = state
        hypergrad, status, loss = _derive(config, data, lam, key)
        best = tree_where(loss < best[0], (loss, lam), best)
        updates, new = META[config.meta].update(hypergrad, slots, lam)
        state = optax.apply_updates(lam, updates), new
        state = tree_where(status == Status.OK, state, (lam, slots))
        return (*state, best), (loss, status)

    return lax.scan(body, state, keys)


def _meta_optimize(
    config: Config, data: Rows, lam: Schedule, seed: int, progress: Progress
) -> tuple[Schedule, np.ndarray]:
    """`(best, losses)`: the schedule with the lowest loss so far, and every iteration's loss."""
    keys = jax.random.split(jax.random.key(seed), config.iterations)
    state = lam, META[config.meta].init(lam), (jnp.asarray(jnp.inf), lam)
    state, (losses, status) = _meta_steps(_static(config), data, state, keys)
    flagged = int(np.sum(np.asarray(status) != Status.OK))
    progress(
        f"schedule: {config.dataset}, seed {seed}: training loss {losses[0]:.3f} at first, "
        f"{losses[-1]:.3f} in the end, lowest {losses.min():.3f}"
        + f"; {flagged} hypergradients discarded"
        * bool(flagged)
    )
    return state[2][1], np.asarray(losses, np.float64)


def _static(config: Config) -> Config:
    """Settings that the compiled program depends on, the others at their defaults."""
    return replace(config, out=Path(), overwrite=False, data_dir=None, seeds=1, fast=False)


# -- judging a schedule ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _train(config: Config, data: Rows, lam: Schedule, key: jax.Array):
    """`(losses on the three parts, training loss by step)` of a run in floating point."""
    train_loss, _ = _losses(data)
    dynamics = from_optax(train_loss, _inner)
    draw_weights, draw_batches = jax.random.split(key)
    inner = dynamics.init(from_noise(noise(draw_weights, LAYERS), lam.log_scale), lam)

    def body(inner, index):
        loss = cross_entropy(inner.params, data.train)
        return dynamics.step(inner, lam, index), loss

    index = batches(draw_batches, config.steps, BATCH, config.examples)
    inner, curve = lax.scan(body, inner, index)
    ends = jnp.stack([cross_entropy(inner.params, part) for part in data])
    return ends, jnp.append(curve, ends[0])


def _judge(config: Config, data: Rows, lam: Schedule, keys: list[jax.Array]) -> np.ndarray:
    """Mean losses over fresh seeds: training, validation, test."""
    return np.mean([_train(_static(config), data, lam, key)[0] for key in keys], axis=0)


def _curve(config: Config, data: Rows, lam: Schedule, key: jax.Array) -> np.ndarray:
    return np.asarray(_train(_static(config), data, lam, key)[1], np.float64)


# -- taking it home --------------------------------------------------------------------------


def _plain(lam: Schedule) -> dict[str, Any]:
    return {
        "groups": names(len(lam.log_scale)),
        "learning_rate": np.exp(lam.log_rate).tolist(),
        "momentum": np.asarray(jax.nn.sigmoid(lam.logit_momentum)).tolist(),
        "initial_scale": np.exp(lam.log_scale).tolist(),
    }


def _describe(lam: Schedule) -> dict[str, Any]:
    return {k: np.asarray(v) if k != "groups" else v for k, v in _plain(lam).items()}


def read_schedule(path: str | Path) -> tuple[list[str], dict[str, Any]]:
    """`(groups, tables)` of a `schedule.json`: learning rates and momenta (steps, groups)."""
    return _parse(Path(path).read_text(encoding="utf-8"))


def _parse(text: str) -> tuple[list[str], dict[str, Any]]:
    content = json.loads(text)
    tables = {k: np.asarray(v) if k != "groups" else v for k, v in content.items()}
    return content["groups"], tables


def schedule_of(column: np.ndarray) -> optax.Schedule:
    """An Optax schedule from a table of its values; the last one holds from then on."""
    values = jnp.asarray(column, jnp.float32)
    return lambda count: values[jnp.minimum(count, len(values) - 1)]


def optimizer(tables: dict[str, Any]) -> optax.GradientTransformation:
    """The Optax optimizer with these schedules, for a list of weights and biases.

    `optax.ema` is momentum in the dampened form of the paper.

    >>> tables = {"learning_rate": np.ones((3, 2)), "momentum": np.full((3, 2), 0.5)}
    >>> step = optimizer(tables)
    >>> w = [jnp.zeros(2), jnp.zeros(1)]
    >>> print(step.update([jnp.ones(2), jnp.ones(1)], step.init(w))[0][0])
    [-0.5 -0.5]
    """
    rates, momenta = tables["learning_rate"], tables["momentum"]
    groups = range(rates.shape[1])
    each: dict[Any, optax.GradientTransformation] = {
        i: optax.chain(
            optax.inject_hyperparams(optax.ema, static_args="debias")(
                decay=schedule_of(momenta[:, i]), debias=False
            ),
            optax.scale_by_learning_rate(schedule_of(rates[:, i])),
        )
        for i in groups
    }
    return optax.partition(each, list(groups))


def _with_optax(config: Config, data: Rows, tables: dict[str, Any]) -> np.ndarray:
    """Losses (seeds, parts) of fresh runs with Optax and nothing of ours."""
    step = optimizer(tables)
    scale = jnp.log(jnp.asarray(tables["initial_scale"], jnp.float32))

    @jax.jit
    def train(key):
        draw_weights, draw_batches = jax.random.split(key)
        params: Any = from_noise(noise(draw_weights, LAYERS), scale)

        def body(state, index):
            params, slots = state
            batch = data.train.inputs[index], data.train.targets[index]
            updates, slots = step.update(jax.grad(cross_entropy)(params, batch), slots, params)
            return (optax.apply_updates(params, updates), slots), None

        index = batches(draw_batches, config.steps, BATCH, config.examples)
        (params, _), _ = lax.scan(body, (params, step.init(params)), index)
        return jnp.stack([cross_entropy(params, part) for part in data])

    return np.array([train(jax.random.key(2_000_000 + i)) for i in range(PAIRS)], np.float64)


# -- files -----------------------------------------------------------------------------------


def _write_meta_curve(losses: np.ndarray, path: Path) -> None:
    """Our losses by meta-iteration beside the published ones."""
    summary = interval(losses)
    table = []
    for i in range(losses.shape[1]):
        published = PUBLISHED[i // 5] if i % 5 == 0 and i // 5 < len(PUBLISHED) else ""
        low, high = (x[i] for x in summary.ci95)
        table.append([i, summary.mean[i], low, high, published])
    _csv(path, ["meta_iteration", "mean", "low", "high", "published"], table)


def _write_training(config: Config, curves: dict[str, np.ndarray], path: Path) -> None:
    """Our losses by training step beside the published ones."""
    table = []
    for t in range(1, config.steps + 1):
        row = [t, curves["initial"][t - 1], "", curves["learned"][t - 1], ""]
        if t in PUBLISHED_STEPS[:-1]:
            i = PUBLISHED_STEPS.index(t)
            row[2], row[4] = PUBLISHED_INITIAL[i], PUBLISHED_LEARNED[i]
        table.append(row)
    header = ["step", "initial", "initial, published", "learned", "learned, published"]
    _csv(path, header, table)


def _csv(path: Path, header: list[str], table: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(table)


def _draw_meta_curve(config: Config, losses: np.ndarray, path: Path) -> None:
    title = f"{config.dataset}, {len(losses)} meta-optimizations"
    figure = new_figure(5.6, 3.8)
    axes = new_axes(figure, title, "meta-iteration", "training loss at the end")
    for each in losses:
        axes.plot(each, color=COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(losses.mean(axis=0), color=COLORS[0], label="here, mean and each")
    axes.plot(5 * np.arange(len(PUBLISHED)), PUBLISHED, "o", color=COLORS[1], label="published")
    axes.legend(frameon=False, labelcolor=INK)
    save(figure, path)


def _draw_training(config: Config, curves: dict[str, np.ndarray], path: Path) -> None:
    plots.curves(
        {name: curve[None] for name, curve in curves.items()},
        path,
        "training step",
        "loss on all training examples",
        f"{config.dataset}, one fresh seed",
        log_y=True,
        band=False,
    )


def _draw_schedules(lam: Schedule, path: Path) -> None:
    figure = new_figure(9.6, 3.8)
    panels = figure.subfigures(1, 2, squeeze=False).ravel()
    tables = _plain(lam)
    for panel, name in zip(panels, ("learning_rate", "momentum"), strict=True):
        axes = new_axes(panel, name.replace("_", " "), "training step", "")
        for i, label in enumerate(tables["groups"]):
            if label.startswith("weights"):  # of the biases see schedule.json
                values = np.array(tables[name])[:, i]
                steps = np.arange(1, len(values) + 1)
                axes.plot(steps, values, label=label, linewidth=1, color=COLORS[i // 2])
    panels[0].axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    save(figure, path)
