"""The run of the study `sinusoid`: settings, rows, table, files."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gradhpo.core.status import Status
from gradhpo.meta import Sinusoids
from gradhpo.report import MethodResult, StudyResult, paired, summarize, write_csv
from gradhpo.report.config import Progress, StudyConfig, silent
from gradhpo.studies.sinusoid import figures
from gradhpo.studies.sinusoid.problem import QUERIES, SHOTS, TASKS, Drawn, draw
from gradhpo.studies.sinusoid.published import TEST_MSE
from gradhpo.studies.sinusoid.settings import GAMMAS, METHODS, OTHERS, SETTINGS, Setting
from gradhpo.studies.sinusoid.training import Outcome, cost, train

__all__ = ["Config", "Row", "rows", "run"]

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
        for row in rows(self):
            if row.setting.steps % self.update_every:
                raise ValueError(
                    f"update_every must divide the {row.setting.steps} steps of a task, which "
                    f"{self.update_every} does not."
                )

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return tuple(METHODS)


class Row(NamedTuple):
    """One line of the table."""

    name: str
    method: str
    setting: Setting
    baseline: str  # the row of one_step in the same setting


def rows(config: Config) -> list[Row]:
    """What is run, in the order of the table.

    >>> [row.name for row in rows(Config(setting="theta_0.3"))]
    ['fo', 'one_step', 'hyperdistill']
    """

    def set_up(setting: Setting) -> Setting:
        shared = {"episodes": config.episodes, "every": config.update_every}
        return replace(setting, gamma=config.gamma, **shared)

    if config.setting == "gamma":
        base = set_up(Setting())
        lines = [Row(name, name, base, "one_step") for name in ("fo", "one_step")]
        for theta in (None, 1.0):
            for gamma in GAMMAS:
                name = f"hyperdistill {gamma:g}" + (", theta 1" if theta else "")
                setting = replace(base, gamma=gamma, theta=theta)
                lines.append(Row(name, "hyperdistill", setting, "one_step"))
        return lines
    several = config.setting == "others"
    lines = []
    for chosen in OTHERS if several else (config.setting,):
        setting = set_up(SETTINGS[chosen])
        before = f"{chosen}: " if several else ""
        for method in config.method or setting.methods:
            lines.append(Row(before + method, method, setting, before + "one_step"))
    return lines


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Run the study; its files are `table.csv`, `theta.csv` and `test_mse.png`."""
    begun = time.perf_counter()
    if config.fast:
        most = {"seeds": 3, "episodes": 10, "tests": 200}
        config = replace(
            config, **{name: min(getattr(config, name), n) for name, n in most.items()}
        )
    lines = rows(config)
    outcomes = _train(config, lines, progress)
    values = {}
    for row in lines:
        curve = np.asarray(outcomes[row.name].test_mse, np.float64)
        values[row.name] = {"test_mse": curve[:, -LAST:].mean(1), "test_mse_by_epoch": curve}
    costs = {row.name: _cost(row) for row in lines}
    table = [_line(row, values, outcomes[row.name], costs[row.name]) for row in lines]
    for line in table:
        progress("sinusoid: " + _told(line))
    files = {
        "table.csv": lambda path: write_csv(path, list(table[0]), [[*x.values()] for x in table]),
        "theta.csv": lambda path: _write_thetas(lines, outcomes, path),
        "test_mse.png": lambda path: figures.draw(config, values, path),
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
    needed = {row.name: (row.method, _seen(row.method, row.setting)) for row in lines}
    drawn: dict[tuple[int, bool], Drawn] = {}
    for _, setting in needed.values():
        key = setting.steps, setting.fresh
        if key not in drawn:
            sinusoids = Sinusoids(setting.steps, SHOTS, QUERIES, fresh=setting.fresh)
            drawn[key] = draw(config.seeds, config.episodes, sinusoids, config.tests)

    def outcome(method: str, setting: Setting) -> Outcome:
        started = time.perf_counter()
        found = train(method, setting, drawn[setting.steps, setting.fresh])
        found = jax.tree.map(np.asarray, found)
        name = next(name for name, wanted in needed.items() if wanted == (method, setting))
        seconds = time.perf_counter() - started
        progress(f"sinusoid: {name}: {config.seeds} seeds trained in {seconds:.0f} s")
        return found

    with ThreadPoolExecutor(2) as pool:
        futures = {wanted: pool.submit(outcome, *wanted) for wanted in needed.values()}
        try:
            return {name: futures[wanted].result() for name, wanted in needed.items()}
        except BaseException:  # an interrupt, too, does not wait for methods that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _seen(method: str, setting: Setting) -> Setting:
    """The setting without what the method does not look at."""
    plain, unseen = Setting(), {"seeds", "methods"}
    if method != "hyperdistill":
        unseen |= {"theta", "guard"}
        if method not in ("greedy", "discounted_sum"):
            unseen.add("gamma")
        if method != "drmad":
            unseen.add("slots")
    elif setting.theta is not None:
        unseen |= {"guard", "slots"}
    return replace(setting, **{name: getattr(plain, name) for name in unseen})


def _cost(row: Row) -> tuple[float, float]:
    size = 100 * (1 + 1 + 2 * 101)
    found = cost(row.method, row.setting, size)
    return found.gradients, found.products


def _line(
    row: Row, values: Mapping[str, Any], outcome: Outcome, spent: tuple[float, float]
) -> dict[str, Any]:
    """A line of the table, by column; intervals as mean and half width."""
    found = values[row.name]["test_mse"]
    line: dict[str, Any] = {"row": row.name, **_pair("test_mse", found)}
    known = TEST_MSE.get(row.name, ("", ""))
    line |= {"published": known[0], "published_half": known[1]}
    for other in ("one_step", "fo"):
        name = row.baseline.replace("one_step", other)
        if name in values and name != row.name:
            line |= _pair(f"minus_{other}", found - values[name]["test_mse"])
        else:
            line |= {f"minus_{other}": "", f"minus_{other}_half": ""}
    fitted = outcome.theta_fit[:, 0]
    line |= {"theta_fit": fitted.mean(), "theta_least": fitted.min(), "theta_most": fitted.max()}
    line["theta_r2"] = outcome.theta_r2[:, 0].mean()
    updates = outcome.counts.sum()
    line["part_refused"] = sum(outcome.counts[:, code].sum() for code in Status if code.rejects)
    line["part_refused"] /= updates
    runs = row.setting.episodes * TASKS
    return line | {"gradients_per_run": spent[0] / runs, "products_per_run": spent[1] / runs}


def _pair(name: str, values: Any) -> dict[str, Any]:
    summary = paired(values, np.zeros_like(values))
    return {name: float(summary.mean), f"{name}_half": float(np.diff(summary.ci95)[0] / 2)}


def _told(line: Mapping[str, Any]) -> str:
    told = f"{line['row']}: test error {line['test_mse']:.3f} +- {line['test_mse_half']:.3f}"
    if line["published"]:
        told += f" (published {line['published']:.3f} +- {line['published_half']:.3f})"
    for other in ("one_step", "fo"):
        if line[f"minus_{other}"] != "":
            mean, half = line[f"minus_{other}"], line[f"minus_{other}_half"]
            told += f", minus {other} {mean:+.3f} +- {half:.3f}"
    if np.isfinite(line["theta_fit"]):
        told += f", theta fitted {line['theta_least']:.2f} to {line['theta_most']:.2f}"
    return told


def _summarized(
    lines: Sequence[Row], values: Mapping[str, Any], costs: Mapping[str, tuple[float, float]]
) -> dict[str, MethodResult]:
    """Each row against one_step in its own setting."""
    results = {}
    for row in lines:
        names = [row.name, *([row.baseline] if row.baseline in values else [])]
        part = {name: values[name] for name in names}
        baseline = row.baseline if len(part) == 2 else None
        results |= {row.name: summarize(part, {row.name: costs[row.name]}, baseline)[row.name]}
    return results


def _write_thetas(lines: Sequence[Row], outcomes: Mapping[str, Outcome], path: Path) -> None:
    """A row per HyperDistill, seed and episode."""
    table = [
        [row.name, seed, m + 1, theta, found.theta_fit[seed, m], found.theta_r2[seed, m]]
        for row in lines
        if row.method == "hyperdistill"
        for found in [outcomes[row.name]]
        for (seed, m), theta in np.ndenumerate(found.theta)
    ]
    write_csv(path, ["row", "seed", "episode", "theta", "theta_fit", "theta_r2"], table)
