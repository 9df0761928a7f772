"""The run of the study: settings, meta-optimizations, and what their schedules are worth."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from gradhpo import datasets
from gradhpo.report import StudyResult, summarize
from gradhpo.report.config import Progress, silent
from gradhpo.report.parts import once
from gradhpo.studies.schedule.export import losses_with_optax, parse, plain
from gradhpo.studies.schedule.figures import (
    draw_meta_curve,
    draw_schedules,
    draw_training,
    write_meta_curve,
    write_training,
)
from gradhpo.studies.schedule.meta import META, meta_optimize
from gradhpo.studies.schedule.problem import Schedule, curve, initial, judge
from gradhpo.studies.shared.reversible import ReversibleConfig, by_part, cost, note_of, rows

__all__ = ["Config", "run"]

FRESH = 5  # seeds that a learned schedule is judged on


@dataclass(frozen=True)
class Config(ReversibleConfig):
    """Settings of the study; `seeds` are meta-optimizations.

    Raises:
        ValueError: a number is out of range.

    >>> Config().meta
    'fast'
    """

    out: Path = Path("results/schedule")
    meta: Literal["fast", "published"] = "fast"
    """Adam for the hyperparameters: rate 0.08 with b2 = 0.99, or rate 0.04."""
    iterations: int = 50
    """Meta-iterations."""
    steps: int = 100
    """Training steps of a run."""
    momentum: float = 0.5
    """Momentum at the start; the paper also has 0.9."""

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return ("initial", "learned")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(iterations=1, steps=1)
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {self.momentum}.")


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
    start = initial(config.steps, config.momentum)
    losses, best = [], []
    for seed in range(config.seeds):
        keys = jax.random.split(jax.random.key(seed), config.iterations)
        how = META[config.meta], data, start, keys
        found, seen, discarded = once(f"seed {seed}", meta_optimize, *how, types=(Schedule,))
        losses.append(seen)
        best.append(found)
        progress(
            f"schedule: {config.dataset}, seed {seed}: training loss {seen[0]:.3f} at first, "
            f"{seen[-1]:.3f} in the end, lowest {seen.min():.3f}{note_of(discarded)}"
        )
    learning = time.perf_counter() - begun
    each = 60 * config.seeds * config.iterations / learning
    progress(f"schedule: {each:.0f} meta-iterations per minute, compilation included")

    fresh = [jax.random.key(1_000_000 + i) for i in range(FRESH)]
    scored = {
        "initial": [once("initial", judge, data, start, fresh)] * config.seeds,
        "learned": [
            once(f"learned, seed {i}", judge, data, lam, fresh) for i, lam in enumerate(best)
        ],
    }
    values = {name: by_part(each) for name, each in scored.items()}
    every = np.array(losses)
    values["learned"]["train_loss_by_epoch"] = every
    chosen = int(np.argmin(values["learned"]["train_loss"]))
    content = json.dumps(plain(best[chosen]), indent=1) + "\n"
    _, schedules = parse(content)  # Optax gets what the file holds
    _, unlearned = parse(json.dumps(plain(start)))
    taken_home = {"optax, initial": unlearned, "optax, learned": schedules}
    pairs = {
        name: by_part(once(name, losses_with_optax, data, each))
        for name, each in taken_home.items()
    }
    alone = config.steps, 0
    costs = {"initial": alone, "learned": cost(config.iterations, config.steps)}
    methods = summarize(values, costs, baseline="initial")
    costs = dict.fromkeys(pairs, alone)
    methods |= summarize(pairs, costs, baseline="optax, initial")
    curves = {
        "initial": curve(data, start, fresh[0]),
        "learned": curve(data, best[chosen], fresh[0]),
    }
    files = {
        "schedule.json": lambda path: path.write_text(content, encoding="utf-8"),
        "meta_curve.csv": lambda path: write_meta_curve(every, path),
        "training.csv": lambda path: write_training(curves, path),
        "meta_curve.png": lambda path: draw_meta_curve(config.dataset, every, path),
        "training.png": lambda path: draw_training(config.dataset, curves, path),
        "schedules.png": lambda path: draw_schedules(best[chosen], path),
    }
    told = ", ".join(f"{k} {v['train_loss'].mean():.3f}" for k, v in {**values, **pairs}.items())
    progress(f"schedule: training loss {told}")
    seconds = time.perf_counter() - begun
    return StudyResult("schedule", config, methods, seconds, loaded.files, files)
