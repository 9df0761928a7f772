"""Before against after: default hyperparameters, and those that a tuning run has learned.

Both trainings start from the same weights and take the same batches in the same order, so
that they differ in the hyperparameters alone. Model, losses and the tuning run are those of a
module in `gradhpo.examples`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax

from gradhpo import datasets
from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.core.dynamics import from_optax
from gradhpo.report import StudyResult, plots, summarize, write_csv
from gradhpo.report.config import Progress
from gradhpo.studies.shared.images import ImageConfig, cost, make_optimizer, parts, scorer

__all__ = ["Example", "Outcome", "before_after", "with_paths"]

Curves = dict[str, np.ndarray]


class Example(Protocol):
    """What a module of `gradhpo.examples` offers to its study."""

    @property
    def OPTIMIZER(self) -> EstimatorOptimizer: ...
    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def logits(self) -> Callable[..., jax.Array]: ...
    @property
    def train_loss(self) -> Callable[..., jax.Array]: ...
    @property
    def batches(self) -> Callable[..., Callable[[], Any]]: ...
    @property
    def tune(self) -> Callable[..., Any]: ...


class Outcome(NamedTuple):
    """A result, and how the hyperparameters moved: by method and name, (seeds, episodes)."""

    result: StudyResult
    paths: dict[str, Curves]


def before_after(
    name: str,
    example: Example,
    config: ImageConfig,
    methods: tuple[str, ...],
    before: Mapping[str, Any],
    values: Callable[[Any], Mapping[str, Any]],
    progress: Progress,
    *,
    restarts: bool = False,
    fast_episodes: int = 20,
) -> Outcome:
    """Run a before-after study; its files are `hyperparameters.csv` and `accuracy.png`.

    Args:
        name: Of the study.
        example: A module of `gradhpo.examples`.
        config: The settings; `config.method` overrides `methods`.
        methods: The study's own choice.
        before: Hyperparameters to compare with, by name; the first are the baseline.
        values: The hyperparameters as people know them (`exp` of a logarithm …).
        progress: Told of every seed.
        restarts: Whether an episode is a whole training run, as in `learning_rate`.
        fast_episodes: At most so many with `config.fast`.

    Returns:
        The result has, for every method `m`, the rows `m`, trained afresh with what it learned,
        and `m online`, what its own run ended with. The first pays for the tuning and for the
        training after it.
    """
    start = time.perf_counter()
    if config.fast:
        config = replace(
            config, seeds=min(config.seeds, 2), episodes=min(config.episodes, fast_episodes)
        )
    methods = tuple(m for m in config.method or methods if m not in config.baselines)
    baseline = next(iter(before))
    data = datasets.load(config.dataset, config.data_dir)
    own = example.OPTIMIZER
    common = {"inner_optimizer": own.inner_optimizer, "outer_optimizer": own.outer_optimizer}
    optimizers = {m: make_optimizer(m, config, **common) for m in methods}
    training = replace(config, episodes=1) if restarts else config
    train, score = _trainer(example, training), scorer(example.logits)
    scores: dict[str, list[np.ndarray]] = {}
    paths: dict[str, list[Curves]] = {m: [] for m in methods}
    for seed in range(config.seeds):
        part = parts(data, config, seed)
        params = example.init(seed, part.train.inputs)
        trained = {row: train(params, lam, part.train, seed) for row, lam in before.items()}
        for method in methods:
            seen: list[Any] = []
            state = example.tune(
                params,
                part.train,
                part.val,
                seed,
                optimizers[method],
                M=config.episodes,
                T=config.steps,
                callback=lambda m, state: seen.append(state),  # noqa: B023
            )
            trained[method] = train(params, state.hyperparams, part.train, seed)
            trained[f"{method} online"] = seen[-1].params  # w_T of the last episode
            steps = [values(state.hyperparams) for state in seen]
            paths[method].append({key: np.array([s[key] for s in steps]) for key in steps[0]})
        for row, params in trained.items():
            scores.setdefault(row, []).append(score(params, part.test))
        told = ", ".join(f"{row} {100 * pairs[-1][1]:.2f} %" for row, pairs in scores.items())
        progress(f"{name}: {config.dataset}, seed {seed}, test accuracy: {told}")

    table = {row: _columns(np.array(pairs)) for row, pairs in scores.items()}
    size = sum(np.size(x) for x in jax.tree.leaves(before[baseline]))
    tuning = {m: np.array(cost(m, config, size)) for m in methods}
    costs = {f"{m} online": tuple(spent.tolist()) for m, spent in tuning.items()}
    alone = np.array(cost("", training))
    costs |= {m: tuple((spent + alone).tolist()) for m, spent in tuning.items()}
    costs |= {row: tuple(alone.tolist()) for row in before}
    seconds = time.perf_counter() - start
    curves = {
        m: {key: np.stack([p[key] for p in all]) for key in all[0]} for m, all in paths.items()
    }
    files: dict[str, Callable[[Path], object]] = {}
    files["hyperparameters.csv"] = lambda path: _write_paths(curves, path)
    if methods:
        accuracy = {row: each["test_accuracy"] for row, each in table.items()}
        files["accuracy.png"] = lambda path: plots.before_after(
            {m: (accuracy[baseline], accuracy[m]) for m in methods},
            path,
            "test accuracy",
            f"{name}: {config.dataset}",
            (baseline, "learned"),
        )
    summaries = summarize(table, costs, baseline=baseline)
    result = StudyResult(name, config, summaries, seconds, data.files, files)
    return Outcome(result, curves)


def with_paths(
    outcome: Outcome, file: str, episode: str, quantity: str, learned: str, log_y: bool = False
) -> StudyResult:
    """The result, with a figure of how the hyperparameters of the first method moved."""
    result, paths = outcome
    if not paths:
        return result
    method, curves = next(iter(paths.items()))
    config = result.settings

    def draw(path: Path) -> None:
        plots.curves(
            curves,
            path,
            f"{episode} of {config.steps} steps",
            quantity,
            f"{learned} learned by {method}, {config.dataset}",
            log_y=log_y,
            band=config.seeds > 2,
        )

    return replace(result, files={**result.files, file: draw})


def _trainer(example: Example, config: ImageConfig) -> Callable[..., Any]:
    """`(params, hyperparams, data, seed) -> params`: training with nothing tuned."""
    dynamics = from_optax(example.train_loss, example.OPTIMIZER.inner_optimizer)  # type: ignore[arg-type]

    @jax.jit
    def advance(inner, hyperparams, batches):
        return lax.scan(lambda s, b: (dynamics.step(s, hyperparams, b), None), inner, batches)[0]

    def train(params, hyperparams, data, seed):
        source = example.batches(data, 2 * seed)  # those of the tuning run
        inner = dynamics.init(params, hyperparams)
        for _ in range(config.episodes):  # a part at a time, to keep memory small
            batches = [source() for _ in range(config.steps)]
            inner = advance(inner, hyperparams, jax.tree.map(lambda *xs: np.stack(xs), *batches))
        return inner.params

    return train


def _columns(pairs: np.ndarray) -> dict[str, np.ndarray]:
    return {"test_loss": pairs[:, 0], "test_accuracy": pairs[:, 1]}


def _write_paths(curves: Mapping[str, Curves], path: Path) -> None:
    """A row per method, hyperparameter, seed (from 0) and episode (from 1)."""
    table = [
        [method, name, seed, episode + 1, value]
        for method, named in curves.items()
        for name, array in named.items()
        for (seed, episode), value in np.ndenumerate(array)
    ]
    write_csv(path, ["method", "hyperparameter", "seed", "episode", "value"], table)
