"""The run of the study: a row for every model and method, files."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradhpo.report import StudyResult, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.drawing import COLORS, new_axes, new_figure, save
from gradhpo.report.parts import once
from gradhpo.studies.cost.measuring import Subject, price, subject, update_flops
from gradhpo.studies.cost.published import PRICES
from gradhpo.studies.shared.meta_learning import (
    FIT_PERIOD,
    META_METHODS,
    META_MODELS,
    meta_method,
    meta_model,
    schedule_of,
)

__all__ = ["Config", "run"]

HORIZONS = (10, 100, 1000)  # at which temporary memory is compared
BASELINE = "one_step"
WAYS = 10
MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study; the defaults are the paper's for CIFAR-100.

    Raises:
        ValueError: a number is out of range.

    >>> Config().models
    ('anil', 'warpgrad', 'meta_weight_net')
    """

    out: Path = Path("results/cost")
    seeds: int = 3
    """Repetitions that are timed; the fastest counts."""
    models: tuple[str, ...] = META_MODELS
    """Which of anil, warpgrad, meta_weight_net."""
    small: bool = False
    """Images of 16 pixels, 8 channels, T = 50, which two cores do in minutes."""
    side: int = 32
    """Pixels of an image."""
    channels: int = 32
    """Channels of every layer."""
    steps: int = 100
    """Steps of an inner-optimization, T."""
    batch_size: int = 100
    """Images of a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(side=8, channels=1, steps=2, batch_size=1)
        if unknown := [name for name in self.models if name not in META_MODELS]:
            raise ValueError(f"unknown model {unknown[0]!r}; known: {', '.join(META_MODELS)}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return META_METHODS


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `memory.csv` and `cost.png`.

    Rows of the result are named `model: method`.
    """
    begun = time.perf_counter()
    config, horizons = _reduced(config), HORIZONS[:2] if config.fast else HORIZONS
    rows: dict[str, dict[str, float]] = {}
    memory: dict[str, list[float]] = {}
    costs: dict[str, tuple[float, float]] = {}
    for name in config.models:
        shape = config.side, config.side, 3
        rate = schedule_of(name, config.steps).rate
        model = meta_model(name, shape, WAYS, config.channels)
        on = subject(model, shape, config.batch_size, rate)
        for method in config.method or META_METHODS:
            row = f"{name}: {method}"
            schedule = schedule_of(name, config.steps)
            rows[row], memory[row] = once(row, _priced, on, name, method, config, horizons)
            fifty = meta_method(method, schedule).cost(
                config.steps, 1, episodes=FIT_PERIOD, period=FIT_PERIOD
            )
            costs[row] = fifty.gradients / FIT_PERIOD, fifty.products / FIT_PERIOD
            told = ", ".join(f"{key} {value:.3g}" for key, value in rows[row].items())
            at = " / ".join(f"{value / MEGA:.2f}" for value in memory[row])
            progress(f"cost: {row}: {told}; MB at T = {' / '.join(map(str, horizons))}: {at}")
    return StudyResult(
        "cost",
        config,
        summarize({row: {k: [v] for k, v in each.items()} for row, each in rows.items()}, costs),
        time.perf_counter() - begun,
        files={
            "table.csv": lambda path: _write(rows, path),
            "memory.csv": lambda path: write_csv(
                path,
                ["model", "method", *(f"temp_bytes_{steps}" for steps in horizons)],
                [[*row.split(": "), *values] for row, values in memory.items()],
            ),
            "cost.png": lambda path: _draw(rows, config, path),
        },
    )


def _priced(
    on: Subject, name: str, method: str, config: Config, horizons: tuple[int, ...]
) -> tuple[dict[str, float], list[float]]:
    """All that is measured, and the memory by the number of steps."""
    schedule = schedule_of(name, config.steps)
    found = price(on, method, schedule, repeats=config.seeds)
    memory = [
        found.temp_bytes
        if steps == config.steps
        else price(on, method, schedule_of(name, steps)).temp_bytes
        for steps in horizons
    ]
    return {"update_flops": update_flops(on, method, schedule), **found._asdict()}, memory


def _reduced(config: Config) -> Config:
    """With what `small` and `fast` ask for."""
    most: dict[str, int] = {}
    if config.small or config.fast:
        most = {"side": 16, "channels": 8, "steps": 50}
    if config.fast:
        most |= {"side": 8, "channels": 2, "steps": 10, "seeds": 1, "batch_size": 10}
    models = config.models[:1] if config.fast else config.models
    least = {name: min(getattr(config, name), n) for name, n in most.items()}
    return replace(config, **least, models=models)


def _ratio(rows: dict[str, dict[str, float]], row: str, key: str) -> float:
    """To one-step on the same model; NaN where that was left out."""
    base = rows.get(f"{row.split(': ')[0]}: {BASELINE}")
    return float("nan") if base is None else rows[row][key] / base[key]


def _write(rows: dict[str, dict[str, float]], path: Path) -> None:
    """What is measured, as numbers and in units of one-step; then what is published."""
    keys = ("update_flops", "flops", "seconds", "temp_bytes")
    header = ["model", "method", "update_gflops", "gflops", "seconds", "temp_mb"]
    header += [f"{key}_to_{BASELINE}" for key in keys]
    header += ["published_mb", "published_seconds", f"published_seconds_to_{BASELINE}"]
    table = []
    for row, found in rows.items():
        model, method = row.split(": ")
        units = (GIGA, GIGA, 1.0, MEGA)
        numbers = [found[key] / unit for key, unit in zip(keys, units, strict=True)]
        mb, seconds = PRICES[model].get(method, (np.nan, np.nan))
        ratios = [_ratio(rows, row, key) for key in keys]
        last = [mb, seconds, seconds / PRICES[model][BASELINE][1]]
        table.append([model, method, *(f"{x:.4g}" for x in [*numbers, *ratios, *last])])
    write_csv(path, header, table)


def _draw(rows: dict[str, dict[str, float]], config: Config, path: Path) -> None:
    """Seconds of an inner-optimization in units of one-step: measured, and published."""
    figure = new_figure(3.2 * len(config.models), 3.2)
    panels = figure.subfigures(1, len(config.models), squeeze=False).ravel()
    for panel, model in zip(panels, config.models, strict=True):
        label = "" if model != config.models[0] else "seconds, one-step = 1"
        axes = new_axes(panel, model, "", label)
        own = [row for row in rows if row.startswith(f"{model}: ")]
        base = PRICES[model][BASELINE][1]
        for i, row in enumerate(own):
            method = row.split(": ")[1]
            axes.bar(i - 0.2, _ratio(rows, row, "seconds"), 0.38, color=COLORS[0])
            if method in PRICES[model]:
                axes.bar(i + 0.2, PRICES[model][method][1] / base, 0.38, color=COLORS[1])
        axes.set_xticks(range(len(own)), [row.split(": ")[1] for row in own], rotation=60)
        if model == config.models[0]:
            axes.bar(0, 0, color=COLORS[0], label="here")
            axes.bar(0, 0, color=COLORS[1], label="published")
            axes.legend(frameon=False, fontsize=8)
    save(figure, path)
