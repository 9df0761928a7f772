"""Before against after: default hyperparameters, and those that a tuning run has learned.

Both trainings start from the same weights and take the same batches in the same order, so
that they differ in the hyperparameters alone. The tasks are those of `gradhpo.examples`, whose
network is one.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

from gradhpo import datasets
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper, Params
from gradhpo.examples.mnist import logits
from gradhpo.report import StudyResult, plots, summarize, write_csv
from gradhpo.report.config import Progress
from gradhpo.report.parts import once
from gradhpo.studies.shared.images import ImageConfig, cost, parts, scorer, tuned

__all__ = ["Outcome", "TaskAt", "before_after", "retrained", "with_paths"]

Curves = dict[str, np.ndarray]
Judge = Callable[[Params], np.ndarray]


TaskAt = Callable[..., Task]
"""`(seed, train, val, test) -> Task`, its sources at their beginning."""


class Outcome(NamedTuple):
    """A result, and how the hyperparameters moved: by method and name, (seeds, episodes)."""

    result: StudyResult
    paths: dict[str, Curves]


def before_after(
    name: str,
    task_at: TaskAt,
    outer: optax.GradientTransformation,
    config: ImageConfig,
    methods: tuple[str, ...],
    before: Mapping[str, Hyper],
    progress: Progress,
    *,
    restarts: bool = False,
    fast_episodes: int = 20,
) -> Outcome:
    """Run a before-after study; its files are `hyperparameters.csv` and `accuracy.png`.

    Args:
        name: Of the study.
        task_at: The task of a seed and its data; it says what its hyperparameters are, `natural`.
        outer: Moves the hyperparameters.
        config: The settings; `config.method` overrides `methods`.
        methods: The study's own choice.
        before: Hyperparameters to compare with, by name; the first are the baseline.
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
    training = replace(config, episodes=1) if restarts else config
    score = scorer(logits)
    scores: dict[str, list[np.ndarray]] = {}
    paths: dict[str, list[Curves]] = {m: [] for m in methods}
    for seed in range(config.seeds):
        part = parts(data, config, seed)
        fresh = partial(task_at, seed, part.train, part.val, part.test)
        judge = partial(_scored, score, part.test)
        judged = {
            row: once(f"seed {seed}, {row}", _left_alone, fresh, lam, training, judge)
            for row, lam in before.items()
        }
        for method in methods:
            how = fresh, method, config, training, outer, 0.0 if restarts else 1.0, judge
            afresh, online, path = once(f"seed {seed}, {method}", _learned, *how)
            judged |= {method: afresh, f"{method} online": online}
            paths[method].append(path)
        for row, pair in judged.items():
            scores.setdefault(row, []).append(pair)
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
            within=(0, 1),
        )
    summaries = summarize(table, costs, baseline=baseline)
    result = StudyResult(name, config, summaries, seconds, data.files, files)
    return Outcome(result, curves)


def _scored(score: Callable[[Params, Any], np.ndarray], test: Any, params: Params) -> np.ndarray:
    return score(params, test)


def _left_alone(
    fresh: Callable[[], Task], hyperparams: Hyper, training: ImageConfig, judge: Judge
) -> np.ndarray:
    return judge(retrained(fresh(), hyperparams, training))


def _learned(
    fresh: Callable[[], Task],
    method: str,
    config: ImageConfig,
    training: ImageConfig,
    outer: optax.GradientTransformation,
    lr_reptile: float,
    judge: Judge,
) -> tuple[np.ndarray, np.ndarray, Curves]:
    """Scores of a training afresh and of the method's own run, and its hyperparameters."""
    seen: list[Any] = []
    state = tuned(
        fresh(),
        method,
        config,
        outer,
        callback=lambda m, state: seen.append(state),
        lr_reptile=lr_reptile,
    )
    afresh = retrained(fresh(), state.hyperparams, training)
    return judge(afresh), judge(seen[-1].params), _path(fresh(), seen)  # w_T of the last episode


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


def retrained(task: Task, hyperparams: Hyper, config: ImageConfig) -> Params:
    """The weights after training with nothing tuned, on the batches of the tuning run."""
    dynamics, source = task.problem.dynamics, task.train
    assert callable(source)
    inner = dynamics.init(task.params, hyperparams)
    for _ in range(config.episodes):  # a part at a time, to keep memory small
        batches = [source() for _ in range(config.steps)]
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
        inner = _advance(dynamics, inner, hyperparams, stacked)
    return inner.params


@partial(jax.jit, static_argnums=0)
def _advance(dynamics, inner, hyperparams, batches):
    return lax.scan(lambda s, b: (dynamics.step(s, hyperparams, b), None), inner, batches)[0]


def _path(task: Task, seen: list[Any]) -> Curves:
    """The hyperparameters of all episodes, as people know them."""
    assert task.natural is not None
    steps = [task.natural(state.hyperparams) for state in seen]
    return {key: np.array([float(step[key]) for step in steps]) for key in steps[0]}


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
