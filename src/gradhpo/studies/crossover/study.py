"""The run of the study: every method at every number of hyperparameters."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gradhpo.core.task import Task
from gradhpo.report import StudyResult, Summary, summarize
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.parts import once
from gradhpo.report.results import MethodResult
from gradhpo.studies.crossover.figure import draw
from gradhpo.studies.crossover.problem import LARGEST, WIDTH, family
from gradhpo.studies.crossover.reaching import (
    Cell,
    Cells,
    findings,
    write_reached,
    write_table,
)
from gradhpo.tuning.comparing import compare
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.searches import SEARCHES, as_gradients, require_optuna

__all__ = ["Config", "rate", "run"]

METHODS = (*SEARCHES, "one_step", "reverse", "hyperdistill")


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().sizes
    (1, 3, 10, 100, 1000, 10000)
    """

    out: Path = Path("results/crossover")
    seeds: int = 10
    """Number of repetitions with different seeds."""
    sizes: tuple[int, ...] = (1, 3, 10, 100, 1000, 10000)
    """Numbers of hyperparameters."""
    trials: int = 250
    """Trials of a search; the others get as many gradients."""
    steps: int = 30
    """Training steps T."""
    tpe_most: int = 100
    """Hyperparameters up to which TPE takes part: beyond, a draw takes far longer than training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(trials=1, steps=1)
        if not self.sizes or not all(1 <= size <= LARGEST for size in self.sizes):
            raise ValueError(f"sizes must be from 1 to {LARGEST}, not {self.sizes}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return METHODS

    @property
    def budget(self) -> int:
        """Gradients that each method takes in a seed."""
        return self.trials * self.steps


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `crossover.csv`, `reached.csv`, `crossover.png`."""
    began = time.perf_counter()
    if config.fast:
        config = replace(config, seeds=min(config.seeds, 2), trials=min(config.trials, 60))
    methods, task = config.method or METHODS, family(config.steps)
    if set(methods) & set(SEARCHES):
        require_optuna()
    cells: Cells = {}
    for size in config.sizes:
        for name in methods:
            if name == "tpe" and size > config.tpe_most:
                progress(f"crossover: H = {size:,}: tpe is left out (--tpe-most)")
                continue
            types = Cell, MethodResult, Summary
            cell = once(f"H = {size}, {name}", _cell, task, size, name, config, types=types)
            cells[size, name] = cell
            progress(f"crossover: H = {size:,}, {name}: {cell}")
    for line in findings(cells, config.budget):
        progress(f"crossover: {line}")
    return StudyResult(
        "crossover",
        config,
        _summaries(cells, config.sizes),
        time.perf_counter() - began,
        files={
            "crossover.csv": partial(write_table, cells, config.budget),
            "reached.csv": partial(write_reached, cells, config.budget),
            "crossover.png": partial(draw, cells, config.budget),
        },
    )


def _cell(task: Callable[..., Task], size: int, name: str, config: Config) -> Cell:
    own = "" if name in SEARCHES else f":outer_rate={rate(name, size, config)}"
    found = compare(
        partial(task, size),
        [name + own],
        config.budget,
        episodes=1,
        steps=config.steps,
        seeds=config.seeds,
        width=WIDTH,
    )
    return Cell(found.methods[name + own], found.wall_seconds / config.seeds)


def rate(name: str, size: int, config: Config) -> float:
    """The rate of Adam for a method that follows gradients, set by a rule before any run: such
    that a tenth of its updates may lead from the start to the edge of the box.

    >>> [round(rate(name, 100, Config()), 3) for name in ("one_step", "reverse", "hyperdistill")]
    [0.016, 0.484, 0.04]
    """
    method = method_of(chosen(name), config.steps)("scan")
    price = as_gradients(method.cost(config.steps, size, episodes=1))
    updates = config.budget / price * config.steps / method.unroll_steps
    return WIDTH / (updates / 10)


def _summaries(cells: Cells, sizes: tuple[int, ...]) -> dict[str, MethodResult]:
    """By `H = ..., method`; differences are to the first method at the same H."""
    all_of: dict[str, MethodResult] = {}
    for size in sizes:
        of_size: Mapping[str, Cell] = {
            f"H = {size:,}, {name}": cell for (n, name), cell in cells.items() if n == size
        }
        values = {
            name: {metric: each.seeds for metric, each in cell.method.metrics.items()}
            for name, cell in of_size.items()
        }
        costs = {
            name: (cell.method.gradient_evaluations, cell.method.second_order_products)
            for name, cell in of_size.items()
        }
        all_of |= summarize(values, costs, baseline=next(iter(of_size), None))
    return all_of
