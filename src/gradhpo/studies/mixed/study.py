"""The run of the study: settings, the methods on every seed, what they found and at what cost."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from gradhpo import datasets
from gradhpo.estimators.reverse import reverse
from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import DataStudyConfig, Progress, silent
from gradhpo.report.drawing import INK, new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.report.parts import once
from gradhpo.studies.mixed.methods import METHODS, RATES, Budget, Found, Seed, judge
from gradhpo.studies.mixed.problem import ACTIVATIONS, WIDTHS, data, init
from gradhpo.tuning.searches import STUDIED, require_optuna

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().trials
    300
    """

    out: Path = Path("results/mixed")
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """Data set; digits come with scikit-learn."""
    seeds: int = 10
    """Number of repetitions with different seeds."""
    train_size: int = 400
    """Training examples."""
    val_size: int = 800
    """Validation examples."""
    steps: int = 100
    """Training steps T of an episode, and of a trial."""
    relaxed: int = 30
    """Episodes with relaxed choices."""
    held: int = 20
    """Episodes after that, the choices held."""
    enumerated: int = 75
    """Episodes with each of the nine choices held, at either outer rate, to know the best one."""
    trials: int = 300
    """Trials of either search; the default is 1.5 times the gradients of the episodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=1, val_size=1, steps=1, relaxed=1, held=1, enumerated=1, trials=1)

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `choices.csv`, `reached.csv`, `losses.csv`, `losses.png`."""
    begun = time.perf_counter()
    if config.fast:
        most = {"seeds": 2, "relaxed": 12, "held": 6, "enumerated": 18, "trials": 54}
        config = replace(
            config, **{name: min(getattr(config, name), n) for name, n in most.items()}
        )
    methods = config.method or tuple(METHODS)
    budget = Budget(config.steps, config.relaxed, config.held, config.enumerated, config.trials)
    if set(methods) & set(STUDIED):
        require_optuna()
    loaded = datasets.load(config.dataset, config.data_dir)
    found: dict[str, list[Found]] = {name: [] for name in methods}
    tests: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(config.seeds):
        seed = _seed(loaded, config, number)
        for name in methods:
            got, test = once(f"seed {number}, {name}", _one, name, budget, seed, types=(Found,))
            found[name].append(got)
            tests[name].append(test)
            progress(
                f"mixed: {config.dataset}, seed {number}, {name}: {_told(got)}, validation loss "
                f"{got.best[-1]:.4f}, test {tests[name][-1]:.4f}"
            )
    values = {
        name: {"val_loss": [each.best[-1] for each in runs], "test_loss": tests[name]}
        for name, runs in found.items()
    }
    reached = _reached(found)
    for line in _findings(found, reached):
        progress(f"mixed: {line}")
    return StudyResult(
        "mixed",
        config,
        summarize(values, {m: _cost(m, config) for m in methods}, baseline=methods[0]),
        time.perf_counter() - begun,
        loaded.files,
        {
            "choices.csv": partial(_write_choices, found, tests),
            "reached.csv": lambda path: write_csv(
                path,
                ["method", "seed", "evaluations"],
                [[name, i, x] for name, each in reached.items() for i, x in enumerate(each)],
            ),
            "losses.csv": partial(_write_losses, found),
            "losses.png": partial(_draw, found, config),
        },
    )


def _one(name: str, budget: Budget, seed: Seed) -> tuple[Found, float]:
    """What a method finds, and the test loss of that."""
    got = METHODS[name](budget, seed)
    return got, judge(budget, seed, got.hyperparams)[1]


def _seed(loaded: datasets.Dataset, config: Config, number: int) -> Seed:
    examples = data(loaded, config.train_size, config.val_size, number)
    weights, noise = jax.random.split(jax.random.key(number))
    params = init(examples.train.inputs.shape[1], weights)  # type: ignore[union-attr]
    return Seed(params, examples, jax.random.split(noise, config.steps), number)


def _cost(method: str, config: Config) -> tuple[float, float]:
    """Gradient evaluations and second-order products of one seed."""
    if method in STUDIED:
        return config.steps * config.trials, 0
    each = len(ACTIVATIONS) * len(WIDTHS) * len(RATES)
    episodes = {
        "reverse": config.relaxed + config.held,
        "enumeration": each * config.enumerated,
    }[method]
    return reverse(config.steps).cost(config.steps, config.train_size, episodes=episodes)


def _told(found: Found) -> str:
    activation, width = found.choice
    return f"{activation}, {width} units"


def _reached(found: Mapping[str, list[Found]]) -> dict[str, np.ndarray]:
    """Gradients until a search is as low as `reverse` in the end, and all that this one took."""
    if "reverse" not in found:
        return {}
    ends = found["reverse"]
    took = {"reverse": np.array([float(each.evaluations[-1]) for each in ends])}
    for name in STUDIED:
        if name in found:
            pairs = zip(found[name], ends, strict=True)
            took[name] = np.array([each.reached(end.best[-1]) for each, end in pairs])
    return took


def _findings(found: Mapping[str, list[Found]], reached: dict[str, np.ndarray]) -> list[str]:
    lines = []
    if "enumeration" in found:
        for name in found:
            pairs = list(zip(found[name], found["enumeration"], strict=True))
            same = sum(each.choice == best.choice for each, best in pairs)
            if name != "enumeration":
                lines.append(f"{name}: the discrete optimum on {same} of {len(pairs)} seeds")
    for name, took in reached.items():
        if name != "reverse":
            middle, given = np.median(took), found[name][0].evaluations[-1]
            number = f"{middle:,.0f}" if np.isfinite(middle) else f"more than {given:,}"
            lines.append(
                f"{name}: as low as reverse after {number} gradients (median), reverse after "
                f"{reached['reverse'][0]:,.0f}"
            )
    return lines


def _write_choices(
    found: Mapping[str, list[Found]], tests: dict[str, list[float]], path: Path
) -> None:
    """A row for each run: what was chosen, its losses, and for `reverse` the loss of mixtures."""
    table = []
    for name, runs in found.items():
        for i, (each, test) in enumerate(zip(runs, tests[name], strict=True)):
            relaxed = each.relaxed if np.isfinite(each.relaxed) else ""
            table.append([name, i, *each.choice, relaxed, each.best[-1], test])
    header = ["method", "seed", "activation", "width", "relaxed_val_loss", "val_loss", "test_loss"]
    write_csv(path, header, table)


def _write_losses(found: Mapping[str, list[Found]], path: Path) -> None:
    """The lowest validation loss of a decided setting so far."""
    table = [
        [name, i, n, best]
        for name, runs in found.items()
        for i, each in enumerate(runs)
        for n, best in zip(each.evaluations, each.best, strict=True)
        if np.isfinite(best)
    ]
    write_csv(path, ["method", "seed", "evaluations", "val_loss"], table)


def _draw(found: Mapping[str, list[Found]], config: Config, path: Path) -> None:
    """Lowest validation losses over gradients, medians and the middle half of the seeds."""
    figure = new_figure(7, 4)
    title = f"{config.dataset}: choices and numbers together, {config.seeds} seeds"
    axes = new_axes(figure, title, "gradients of the training loss", "lowest validation loss")
    axes.set_yscale("log")
    lines = {}
    for name, runs in found.items():
        x, best = runs[0].evaluations, np.array([each.best for each in runs])
        known = np.isfinite(best).all(0)
        low, middle, high = np.quantile(best[:, known], [0.25, 0.5, 0.75], axis=0)
        if name == "enumeration":
            axes.axhline(middle[-1], color=INK, linewidth=1, linestyle=":")
            axes.text(
                0, middle[-1], " all nine choices, one by one", color=INK, fontsize=8, va="top"
            )
            continue
        lines[name] = Line(x[known], middle, low, high)
    draw_lines(axes, lines)
    save(figure, path)
