"""Cosine to the exact hypergradient against cost, for every method on a few small problems.

A ridge regression with a penalty per weight, at its minimum, where implicit differentiation
is exact, and in training, on small batches; and three problems of `gradhpo.testing.problems`.
Everything is in float64; see `gradhpo.diagnostics`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.source import InOrder
from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.core.types import Params
from gradhpo.diagnostics import HypergradientCheck, check_hypergradient, known_methods
from gradhpo.diagnostics.rows import Row
from gradhpo.report import StudyResult, summarize
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import FAINT, INK, new_figure, save
from gradhpo.report.parts import once
from gradhpo.testing.problems import learning_rates, mlp_momentum, straight_line
from gradhpo.utils._partition import is_differentiable

__all__ = ["Config", "ridge_at_minimum", "run"]

CONVERGED = 600
"""Steps at the minimum, after which the unrolled derivative is the implicit one."""


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    >>> Config().steps
    20
    """

    out: Path = Path("results/check")
    seeds: int = 3
    """Starting points: the problems' own, then that one with noise on the weights."""
    steps: int = 20
    """Training steps T that the exact hypergradient looks through."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(steps=1)

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        """The methods that need no setting of a problem's own."""
        return known_methods()


def ridge_at_minimum(steps: int) -> Task:
    """Ridge regression on full batches, with a penalty per weight, from its minimum.

    >>> task = ridge_at_minimum(2)
    >>> loss = task.problem.dynamics.parts.train_loss
    >>> batch = jax.tree.map(lambda x: x[0], task.train.batches)
    >>> bool(jnp.linalg.norm(jax.grad(loss)(task.params, task.hyperparams, batch)) < 1e-6)
    True
    """
    problem, lam, *sides = _ridge()
    x, y = sides[0]
    w = np.linalg.solve(x.T @ x / len(x) + np.diag(np.exp(lam)), x.T @ y / len(x))
    train, val = (InOrder([np.repeat(a[None], steps, axis=0) for a in side]) for side in sides)
    return Task(problem, w, lam, train, val)


def ridge_in_training(steps: int) -> Task:
    """The same from zero, on batches of twenty."""
    problem, lam, *sides = _ridge()
    draw = np.random.default_rng(12).integers
    rows = [draw(0, 60, (steps, 20)) for _ in sides]
    train, val = (InOrder([a[i] for a in side]) for side, i in zip(sides, rows, strict=True))
    return Task(problem, np.zeros(12), lam, train, val)


def _ridge() -> tuple[Any, Any, Any, Any]:
    """Problem, penalties, training and validation data."""
    draw = np.random.default_rng(11).standard_normal
    x, x_val, w_true = draw((60, 12)), draw((60, 12)), draw(12)
    y, y_val = x @ w_true + 0.5 * draw(60), x_val @ w_true

    def val_loss(w, lam, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) / 2

    def train_loss(w, lam, batch):
        return val_loss(w, lam, batch) + jnp.sum(jnp.exp(lam) * w**2) / 2

    problem = BilevelProblem(from_optax(train_loss, optax.sgd(0.1)), val_loss)
    return problem, draw(12) - 1, (x, y), (x_val, y_val)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Check every method on every problem; its file is `check.png`.

    Rows of the result are named `problem: method`; refused methods have none.
    """
    began = time.perf_counter()
    problems = {
        "ridge at its minimum": (ridge_at_minimum, CONVERGED),
        "ridge in training": (ridge_in_training, config.steps),
        "learning rates": (learning_rates, config.steps),
        "straight line": (straight_line, config.steps),
        "network with momentum": (mlp_momentum, config.steps),
    }
    if config.fast:
        problems = dict(list(problems.items())[:2])
    checks: dict[str, list[HypergradientCheck]] = {}
    for name, (problem_at, steps) in problems.items():
        task = problem_at(steps)
        methods = config.method or known_methods()
        moved = [task.replace(params=_moved(task.params, seed)) for seed in range(config.seeds)]
        checks[name] = [
            once(
                f"{name}, start {seed}",
                check_hypergradient,
                each,
                steps,
                methods,
                types=(HypergradientCheck, Row, Status),
            )
            for seed, each in enumerate(moved)
        ]
        for line in ("", name, *str(checks[name][0]).splitlines()):
            progress(line)
    methods = summarize(*_numbers(checks))
    files = {"check.png": lambda path: _draw(checks, path)}
    return StudyResult("check", config, methods, time.perf_counter() - began, files=files)


def _moved(start: Params, seed: int) -> Params:
    """The weights with noise; as they are for seed 0."""
    if seed == 0:
        return start
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(
        lambda x: x + 0.1 * draw(np.shape(x)).astype(x.dtype) if is_differentiable(x) else x, start
    )


def _numbers(checks: Mapping[str, list[HypergradientCheck]]) -> tuple[dict, dict]:
    """Values and costs for `summarize`."""
    values, costs = {}, {}
    for problem, seeds in checks.items():
        for method, first in seeds[0].rows.items():
            if first.refused:
                continue
            rows = [check.rows[method] for check in seeds]
            values[f"{problem}: {method}"] = {
                metric: [getattr(row, metric) for row in rows]
                for metric in ("cosine", "norm_ratio", "relative_error")
            }
            costs[f"{problem}: {method}"] = (first.gradients or 0, first.products or 0)
    return values, costs


def _draw(checks: Mapping[str, list[HypergradientCheck]], path: Path) -> Path:
    """A panel per problem, a row per method; the other starting points are small dots."""
    rows = next(iter(checks.values()))[0].rows
    figure = new_figure(1.4 + 2.1 * len(checks), 1.5 + 0.22 * len(rows))
    apart = {"wspace": 0.25}  # a panel's column of costs is nearer to it than to the next one
    panels = figure.subplots(1, len(checks), squeeze=False, gridspec_kw=apart).ravel()
    for axes, (problem, seeds) in zip(panels, checks.items(), strict=True):
        seeds[0].draw(axes)
        for check in seeds[1:]:
            cosines = [row.cosine for row in check.rows.values()]
            axes.plot(cosines, range(len(cosines)), ".", color=FAINT, markersize=5, zorder=2)
        title = f"{problem}\nT = {seeds[0].steps}"
        axes.set_title(title, loc="left", fontsize=9, color=INK, pad=16)
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return save(figure, path)
