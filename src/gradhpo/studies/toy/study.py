"""The run of the study `toy`: problem, methods, curves, files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.delay import update_every
from gradhpo.core.dynamics import InnerState, from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.step import init_state
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse
from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import new_axes, new_figure, save, styles
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.solvers import neumann
from gradhpo.studies.toy.published import LAST_COSINE, LOSSES, STEPS
from gradhpo.utils._precision import float64

__all__ = ["Config", "Curve", "METHODS", "PROBLEM", "follow", "run"]

RATE = 0.2  # of training
START = (2.0, 2.0), (1.0, 1.0)  # w, lam
CURVATURE = np.array([1.0, 0.5])


def train_loss(w, lam, batch):
    del batch
    return jnp.sum(CURVATURE * (w - lam) ** 2) / 2


def val_loss(w, lam, batch):
    del lam, batch
    return jnp.sum(w**2) + 10 * jnp.sum(jnp.sin(w) ** 2)


PROBLEM = BilevelProblem(from_optax(train_loss, optax.sgd(RATE)), val_loss)


def _methods(T: int, iterations: int) -> dict[str, tuple[int, Estimator]]:
    """Name -> (T, method), as the paper names them."""
    named = {
        "full": reverse(T),
        f"IFT({iterations})": implicit(T, neumann(iterations, RATE)),
        "T1-T2": update_every(one_step(), T),
        **{f"greedy {gamma}": greedy(gamma, T) for gamma in (0.9, 0.5, 0.3)},
    }
    return {f"{name}, T={T}": (T, method) for name, method in named.items()}


METHODS = _methods(5, 2) | _methods(10, 5)


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config(outer_rate=0.1).steps
    1000
    """

    out: Path = Path("results/toy")
    seeds: int = 1
    """Starting points: the paper's, then that one moved by normal noise of 1/4."""
    steps: int = 1000
    """Outer steps."""
    outer_rate: float = 1e-4
    """Outer rate; at 0.1, as the paper's text has it, every method is done within 100 steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(steps=1)
        if not 0 < self.outer_rate < np.inf:
            raise ValueError(f"outer_rate must be positive, not {self.outer_rate}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


class Curve(NamedTuple):
    """One run; every array has the outer steps as its leading axis."""

    loss: Any  # L_val after the inner steps of outer step k
    hypergrad: Any  # the method's, (steps, 2)
    exact: Any  # the exact one at the same state, (steps, 2)


@partial(jax.jit, static_argnums=(0, 1, 2))
def follow(
    method: Estimator, T: int, steps: int, w: jax.Array, lam: jax.Array, rate: float
) -> Curve:
    """Outer steps of plain descent, each after T training steps from where the last one ended."""
    outer = optax.sgd(rate)
    windows = Window(*(jnp.zeros((steps, T), w.dtype),) * 2)  # no data
    state = init_state(PROBLEM, method, outer, w, lam)
    _, (ends, lams, loss) = run_episodes(
        method,
        outer,
        PROBLEM,
        state,
        windows,
        observe=lambda state: (state.params, state.hyperparams, state.metadata["val_loss"]),
    )
    starts, before = (
        jnp.concatenate([first[None], rest[:-1]]) for first, rest in ((w, ends), (lam, lams))
    )

    def exact(w, lam, window):
        inner = InnerState(w, state.inner_opt_state)
        return reverse(T).estimate(PROBLEM, (), inner, lam, window).hypergrad

    return Curve(loss, (before - lams) / rate, jax.vmap(exact)(starts, before, windows))


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `published.csv`, `cosine.csv` and `toy.png`."""
    begun = time.perf_counter()
    if config.fast:
        config = replace(config, steps=min(config.steps, 101))
    names = config.method or tuple(METHODS)
    noise = 0.25 * np.random.default_rng(0).standard_normal((config.seeds, 2, 2))
    noise[0] = 0
    starts = np.array(START) + noise
    with float64():
        curves = {name: once(name, _runs, name, config, starts, types=(Curve,)) for name in names}
        full = {
            T: once(f"exact, T={T}", _runs, f"full, T={T}", config, starts, types=(Curve,))
            for T in dict.fromkeys(METHODS[name][0] for name in names)
        }
    values = {}
    for name, curve in curves.items():
        same = _cosine(curve.hypergrad, curve.exact)
        values[name] = {
            "val_loss": curve.loss[:, -1],
            "cosine": same[:, -1],
            "norm_ratio": (_norm(curve.hypergrad) / _norm(curve.exact))[:, -1],
            "val_loss_by_epoch": curve.loss,
            "cosine_by_epoch": same,
        }
    others = {
        name: _cosine(curve.hypergrad, full[METHODS[name][0]].hypergrad)
        for name, curve in curves.items()
    }
    table = _against_published(curves, others) if config.outer_rate == Config.outer_rate else []
    for name in names:
        progress(f"toy: {name}: {_told(values[name], others[name], table, name)}")
    costs = {}
    for name in names:
        T, method = METHODS[name]
        costs[name] = method.cost(T, 2, episodes=config.steps)
    header = ["method", "quantity", "outer step", "published", "here", "relative difference"]
    files = {
        "published.csv": lambda path: write_csv(path, header, table),
        "cosine.csv": lambda path: _write(values, others, path),
        "toy.png": lambda path: _draw(values, others, bool(table), path),
    }
    seconds = time.perf_counter() - begun
    return StudyResult("toy", config, summarize(values, costs), seconds, files=files)


def _runs(name: str, config: Config, starts: np.ndarray) -> Curve:
    """The method from every start; arrays (starts, steps, ...)."""
    T, method = METHODS[name]
    each = [follow(method, T, config.steps, w, lam, config.outer_rate) for w, lam in starts]
    return Curve(*(np.stack(x) for x in zip(*each, strict=True)))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, -1) / (_norm(a) * _norm(b))


def _norm(a: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a, axis=-1)


def _against_published(
    curves: Mapping[str, Curve], others: Mapping[str, np.ndarray]
) -> list[tuple[str, str, int, float, float, float]]:
    """A row per published number that the run has come to; from the paper's start alone."""
    rows = []
    for name, curve in curves.items():
        known = [("val_loss", k, x, curve.loss) for k, x in zip(STEPS, LOSSES[name], strict=True)]
        known.append(("cosine to the full run", STEPS[-1], LAST_COSINE[name], others[name]))
        for quantity, k, published, ours in known:
            if k < ours.shape[1]:
                here = float(ours[0, k])
                rows.append((name, quantity, k, published, here, here / published - 1))
    return rows


def _told(values: Mapping, other: np.ndarray, table: list, name: str) -> str:
    text = (
        f"loss {values['val_loss'][0]:.3f}, cosine at the same state {values['cosine'][0]:.4f}, "
        f"to the full run {other[0, -1]:.4f}"
    )
    off = [abs(row[-1]) for row in table if row[0] == name]
    return text + (f"; at most {100 * max(off):.3f} % off the published numbers" if off else "")


def _write(values: Mapping, others: Mapping[str, np.ndarray], path: Path) -> None:
    """A row per method, start and outer step."""
    table = [
        [name, seed, k, same, others[name][seed, k]]
        for name, each in values.items()
        for (seed, k), same in np.ndenumerate(each["cosine_by_epoch"])
    ]
    header = ["method", "seed", "outer step", "cosine at the same state", "cosine to the full run"]
    write_csv(path, header, table)


def _draw(values: Mapping, others: Mapping[str, np.ndarray], published: bool, path: Path) -> Path:
    """A row of panels for each T: the loss, with the published points, and both cosines."""
    horizons = list(dict.fromkeys(METHODS[name][0] for name in values))
    figure = new_figure(13.4, 3.6 * len(horizons))
    rows = figure.subfigures(len(horizons), 1, squeeze=False).ravel()
    for T, row in zip(horizons, rows, strict=True):
        panels = row.subfigures(1, 3, squeeze=False).ravel()
        labels = ("validation loss", "cosine, same state", "cosine to the full run's")
        for i, (panel, label) in enumerate(zip(panels, labels, strict=True)):
            title = f"T = {T}{published * '; circles: published'}" if i == 0 else " "
            axes = new_axes(panel, title, "outer step", label)
            lines = {}
            for name in values:
                if METHODS[name][0] == T:
                    same = (values[name]["val_loss_by_epoch"], values[name]["cosine_by_epoch"])
                    y = (*same, others[name])[i].mean(0)
                    lines[name.split(",")[0]] = Line(np.arange(len(y)), y)
            if i == 0 and published:
                for name, look in styles(lines).items():
                    points = LOSSES[f"{name}, T={T}"]
                    axes.plot(STEPS, points, "o", color=look.color, markersize=9, mfc="none")
            draw_lines(axes, lines)
    return save(figure, path)
