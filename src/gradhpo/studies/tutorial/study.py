"""The run of the study `tutorial`: its settings, both of them, their table, files and the demo."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.loop import linear_decay
from gradhpo.report import StudyResult, summarize, table, write_each
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import require_matplotlib
from gradhpo.report.parts import once
from gradhpo.studies.tutorial import problem
from gradhpo.studies.tutorial.figure import convergence
from gradhpo.studies.tutorial.findings import LITERAL, best_episode, findings
from gradhpo.studies.tutorial.problem import Outcome
from gradhpo.utils.logging import ProgressLogger

__all__ = ["Config", "DemoConfig", "demo", "run", "separated", "train"]

COMPARED = ("fixed", "fo", "one_step", "t1t2", "greedy", "hyperdistill")
FIGURE = "hyperdistill_poc.png"


@dataclass(frozen=True)
class Config(StudyConfig):
    """One learning rate per weight of a small network, tuned by each method."""

    baselines = ("fixed",)

    out: Path = Path("results/tutorial")
    seeds: int = 20
    episodes: int = 60
    """Episodes M."""
    steps: int = 20
    """Inner steps T of an episode."""
    outer: Literal["sgd", "adam"] = "sgd"
    """How learning rates are moved: plain steps at a rate that falls linearly to 0, or Adam."""
    outer_rate: float = 3e-3
    """Rate of the outer optimizer."""
    learning_rate: float = 0.05
    """Where all learning rates start."""
    restart: bool = False
    """Start every episode from the initial weights again; only learning rates are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(episodes=1, steps=1)
        for name in ("outer_rate", "learning_rate"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
        unroll = problem.SETTINGS["greedy"]["unroll_steps"]
        if self.steps % unroll and "greedy" in self.methods:
            raise ValueError(f"steps must be a multiple of greedy's {unroll}, not {self.steps}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return (*cls.baselines, *problem.SETTINGS)  # those that can tune a learning rate

    @property
    def methods(self) -> tuple[str, ...]:
        """What is compared: the choice, after the baseline."""
        return ("fixed", *(name for name in self.method or COMPARED[1:] if name != "fixed"))

    def shortened(self) -> "Config":
        """Itself, or what `fast` makes of it."""
        if not self.fast:
            return self
        return replace(self, seeds=min(self.seeds, 5), episodes=min(self.episodes, 10))


@dataclass(frozen=True)
class DemoConfig(Config):
    """The settings of `gradhpo demo`, which has a directory of its own.

    >>> DemoConfig(seeds=3).out.name
    'demo'
    """

    out: Path = Path("out/demo")


def separated(config: Config) -> Config:
    """The setting in which the methods differ: Adam, and learning rates that start too low.

    >>> separated(Config(seeds=3)).outer_rate
    0.01
    """
    out = config.out / "separated"
    return replace(config, out=out, outer="adam", outer_rate=0.01, learning_rate=0.005)


def train(config: Config, done: Callable[[str, Outcome], None]) -> dict[str, Outcome]:
    """Train all seeds with each method, each method one compiled program for all seeds.

    Data and batch indices are drawn with NumPy and passed in: random numbers drawn inside
    would be compiled into every program. Two programs at a time are compiled and run.

    Args:
        config: The setting.
        done: Told the name and the outcome of every method, in the order they finish.
    """
    drawn = [problem.draw(seed, config.episodes, config.steps) for seed in range(config.seeds)]
    weights, data, indices = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *drawn))
    rates = linear_decay(config.outer_rate, config.episodes)
    if config.outer == "adam":
        rates = jnp.full_like(rates, config.outer_rate)
    setting = (jnp.float32(config.learning_rate), jnp.asarray(config.outer == "adam"), rates)

    def compute(name: str) -> Outcome:
        if name == LITERAL:
            five = jax.tree.map(lambda x: x[:, :, :5], indices)
            rest = jnp.float32(0.01), jnp.asarray(True), jnp.full_like(rates, 3e-3)
            arrays = problem.literal_greedy()(weights, data, five, *rest)
        elif name == "fixed":
            compiled = problem.untuned(config.restart)
            arrays = compiled(weights, data, indices, *setting)
        else:
            compiled = problem.tuned(name, config.steps, config.restart)
            arrays = compiled(weights, data, indices, *setting)
        return Outcome(*(np.asarray(x, np.float64) for x in arrays))

    def outcome(name: str) -> Outcome:
        found = once(name, compute, name, types=(Outcome,))
        done(name, found)
        return found

    names = _rows(config)
    with ThreadPoolExecutor(2) as pool:  # the longest first
        tasks = {name: pool.submit(copy_context().run, outcome, name) for name in reversed(names)}
        try:
            return {name: tasks[name].result() for name in names}
        except BaseException:  # an interrupt, too, does not wait for methods that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _rows(config: Config) -> tuple[str, ...]:
    """Methods, and greedy's literal call beside greedy in the setting it comes from."""
    literal = "greedy" in config.methods and config.outer == "sgd" and config.steps >= 5
    return (*config.methods, *([LITERAL] if literal else []))


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run one setting; its file is `convergence.png`.

    Returns:
        Per method `val_loss`, the mean of the last 5 episodes, with the paired difference to
        "fixed", and `val_loss_by_epoch`, the loss after each episode.
    """
    started = time.perf_counter()
    config = config.shortened()
    outcomes = train(config, lambda name, _: progress(f"{name}: {config.seeds} seeds done"))
    panels = {_title(config): _curves(outcomes)}
    files = {"convergence.png": lambda path: convergence(panels, path)}
    return replace(_result(config, outcomes, started), files=files)


def _result(config: Config, outcomes: Mapping[str, Outcome], started: float) -> StudyResult:
    values = {
        name: {"val_loss": found.score, "val_loss_by_epoch": found.losses}
        for name, found in outcomes.items()
    }
    costs = {name: problem.cost(name, config.episodes, config.steps) for name in config.methods}
    if LITERAL in outcomes:
        costs[LITERAL] = problem.cost("greedy", config.episodes, 5)
    methods = summarize(values, costs, baseline="fixed")
    return StudyResult("tutorial", config, methods, time.perf_counter() - started)


def _title(config: Config) -> str:
    outer = "Adam" if config.outer == "adam" else "SGD"
    restart = ", restarted" if config.restart else ""
    return (
        f"outer {outer} {config.outer_rate:g}, all rates start at {config.learning_rate:g}{restart}"
    )


def _curves(outcomes: Mapping[str, Outcome]) -> dict[str, np.ndarray]:
    return {name: found.losses for name, found in outcomes.items() if name != LITERAL}


def demo(config: Config, command: str = "gradhpo demo") -> None:
    """Run both settings, print what they show and write the files; the last line is the time.

    The figure, `hyperdistill_poc.png`, is left out where Matplotlib is missing.

    Args:
        config: The first setting; the second goes to `config.out / "separated"`.
        command: The command line, for `result.json`.
    """
    started = time.perf_counter()
    config = config.shortened()
    try:
        require_matplotlib()
        draws = True
    except ImportError as error:
        print(f"no figure: {error}")
        draws = False
    settings = [config, separated(config)]
    print(
        f"517 learning rates of a network 10-32-5, {config.seeds} seeds, {config.episodes} episodes"
    )
    print(
        f"of {config.steps} steps, two settings. val_loss is the mean of the last 5 episodes.\n",
        flush=True,
    )
    with ProgressLogger(total=sum(len(_rows(each)) for each in settings)) as logger:
        finished: list[str] = []

        def done(name: str, found: Outcome) -> None:
            finished.append(name)
            logger.log({f"{name} val_loss": found.score.mean()}, step=len(finished))

        results, panels = [], {}
        for each in settings:
            begun = time.perf_counter()
            outcomes = train(each, done)
            panels[_title(each)] = _curves(outcomes)
            result = replace(_result(each, outcomes, begun), command=command)
            results.append((each, outcomes, result))
    for i, (each, outcomes, result) in enumerate(results, start=1):
        print(f"Setting {i}: {_title(each)}\n\n{table(result)}\n")
        print(best_episode(outcomes), findings(outcomes), sep="\n", end="\n\n", flush=True)
    (_, _, first), (_, _, second) = results
    if draws:
        first = replace(first, files={FIGURE: lambda path: convergence(panels, path)})
    for each, result in ((settings[1], second), (settings[0], first)):  # the figure comes last
        for path in write_each(result, each.out):
            print(f"wrote {path}")
    print(f"demo: compute {time.perf_counter() - started:.1f} s")
