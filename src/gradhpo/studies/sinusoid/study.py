"""The run of the study `sinusoid`: settings, rows, table, files."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradhpo.core.estimator import Cost
from gradhpo.meta import Sinusoids
from gradhpo.report import MethodResult, StudyResult, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.report.parts import once
from gradhpo.studies.sinusoid import figures
from gradhpo.studies.sinusoid.problem import QUERIES, SHOTS, SIZE, Drawn, draw
from gradhpo.studies.sinusoid.settings import METHODS, SETTINGS, Row, Setting, rows, seen
from gradhpo.studies.sinusoid.table import line_of, told, write_thetas
from gradhpo.studies.sinusoid.training import Outcome, cost, train

__all__ = ["Config", "run"]

LAST = 5  # episodes that the test error is the mean of


@dataclass(frozen=True)
class Config(StudyConfig):
    """Settings of the study.

    Raises:
        ValueError: a number is out of range.

    >>> Config().seeds, Config(setting="strong").episodes
    (20, 100)
    """

    out: Path = Path("results/sinusoid")
    setting: Literal[
        "published",
        "strong",
        "full_jacobian",
        "unguarded",
        "theta_0.3",
        "theta_0.66",
        "no_momentum",
        "short",
        "long",
        "fixed_queries",
        "gamma",
        "others",
    ] = "published"
    """The one that the published numbers come from, or what changes when it is changed; `gamma`
    and `others` are several in one table."""
    seeds: int = 0
    """Number of repetitions; 0: 20 for `published` alone, else 10."""
    episodes: int = 0
    """Meta-batches M; 0: 30, and 100 for `strong`."""
    tests: int = 1000
    """Test tasks."""
    gamma: float = 0.99
    """Discount of HyperDistill."""
    update_every: int = 1
    """Training steps per update of fo, one_step and HyperDistill; the products that the paper
    counts are those of 2."""

    def __post_init__(self) -> None:
        setting = SETTINGS.get(self.setting, Setting())
        for name in ("seeds", "episodes"):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(setting, name))
        super().__post_init__()
        self._at_least(episodes=1, tests=1, update_every=1)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, not {self.gamma}.")
        for row in self.rows():
            if row.setting.steps % self.update_every:
                raise ValueError(
                    f"update_every must divide the {row.setting.steps} steps of a task, which "
                    f"{self.update_every} does not."
                )

    def rows(self) -> list[Row]:
        """What is run, in the order of the table."""
        shared = {"episodes": self.episodes, "every": self.update_every, "gamma": self.gamma}
        return rows(self.setting, self.method, **shared)

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `theta.csv` and `test_mse.png`."""
    begun = time.perf_counter()
    if config.fast:
        most = {"seeds": 3, "episodes": 10, "tests": 200}
        config = replace(
            config, **{name: min(getattr(config, name), n) for name, n in most.items()}
        )
    lines = config.rows()
    outcomes = _train(config, lines, progress)
    values = {}
    for row in lines:
        curve = np.asarray(outcomes[row.name].test_mse, np.float64)
        values[row.name] = {"test_mse": curve[:, -LAST:].mean(1), "test_mse_by_epoch": curve}
    costs = {row.name: cost(row.method, row.setting, SIZE) for row in lines}
    last = {name: each["test_mse"] for name, each in values.items()}
    table = [line_of(row, last, outcomes[row.name], costs[row.name]) for row in lines]
    for line in table:
        progress("sinusoid: " + told(line))
    title = f"{config.setting}, {config.seeds} seed{'s' * (config.seeds != 1)}"
    published = any(line["published"] for line in table)
    files = {
        "table.csv": lambda path: write_csv(path, list(table[0]), [[*x.values()] for x in table]),
        "theta.csv": lambda path: write_thetas(lines, outcomes, path),
        "test_mse.png": lambda path: figures.draw(title, values, published, path),
    }
    return StudyResult(
        "sinusoid",
        config,
        _summarized(lines, values, costs),
        time.perf_counter() - begun,
        files=files,
    )


def _train(config: Config, lines: Sequence[Row], progress: Progress) -> dict[str, Outcome]:
    """Two programs at a time; what settings cannot tell apart runs once."""
    needed = {row.name: (row.method, seen(row.method, row.setting)) for row in lines}
    drawn: dict[tuple[int, bool], Drawn] = {}
    for _, setting in needed.values():
        key = setting.steps, setting.fresh
        if key not in drawn:
            sinusoids = Sinusoids(setting.steps, SHOTS, QUERIES, fresh=setting.fresh)
            drawn[key] = draw(config.seeds, config.episodes, sinusoids, config.tests)

    def outcome(method: str, setting: Setting) -> Outcome:
        started = time.perf_counter()
        name = next(name for name, wanted in needed.items() if wanted == (method, setting))
        data = drawn[setting.steps, setting.fresh]
        found = once(name, train, method, setting, data, types=(Outcome,))
        seconds = time.perf_counter() - started
        progress(f"sinusoid: {name}: {config.seeds} seeds trained in {seconds:.0f} s")
        return found

    with ThreadPoolExecutor(2) as pool:
        futures = {
            each: pool.submit(copy_context().run, outcome, *each)
            for each in dict.fromkeys(needed.values())
        }
        try:
            return {name: futures[wanted].result() for name, wanted in needed.items()}
        except BaseException:  # an interrupt, too, does not wait for methods that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _summarized(
    lines: Sequence[Row], values: Mapping[str, Any], costs: Mapping[str, Cost]
) -> dict[str, MethodResult]:
    """Each row against one_step in its own setting."""
    results = {}
    for row in lines:
        names = [row.name, *([row.baseline] if row.baseline in values else [])]
        part = {name: values[name] for name in names}
        baseline = row.baseline if len(part) == 2 else None
        results |= {row.name: summarize(part, {row.name: costs[row.name]}, baseline)[row.name]}
    return results
