"""The table of the study `sinusoid`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.core.estimator import Cost
from gradhpo.core.status import Status
from gradhpo.report import interval, write_csv
from gradhpo.studies.sinusoid.problem import TASKS
from gradhpo.studies.sinusoid.published import TEST_MSE
from gradhpo.studies.sinusoid.settings import SETTINGS, Row, seen
from gradhpo.studies.sinusoid.training import Outcome

__all__ = ["line_of", "told", "write_thetas"]

DIVERGED = 10.0  # a mean square error; that of predicting zero is 4.3


def line_of(
    row: Row, test_mse: Mapping[str, np.ndarray], outcome: Outcome, spent: Cost
) -> dict[str, Any]:
    """A line by column: means over seeds with half intervals, how many seeds have diverged, the
    published number where the row is of its setting, paired differences to one_step and fo, theta,
    costs of an inner-optimization."""
    found = test_mse[row.name]
    line: dict[str, Any] = {"row": row.name, **_pair("test_mse", found)}
    line |= {"median": float(np.median(found)), "diverged": int(np.sum(~(found < DIVERGED)))}
    same = seen(row.method, row.setting) == seen(row.method, SETTINGS["published"])
    known = TEST_MSE.get(row.method) if same else None
    line |= dict(zip(("published", "published_half"), known or ("", ""), strict=True))
    for other in ("one_step", "fo"):
        base = test_mse.get(row.baseline.replace("one_step", other))
        differs = base is not None and base is not found
        name = f"minus_{other}"
        line |= _pair(name, found - base) if differs else {name: "", f"{name}_half": ""}
    fitted = outcome.theta_fit[:, 0]
    line |= {"theta_fit": fitted.mean(), "theta_least": fitted.min(), "theta_most": fitted.max()}
    line["theta_r2"] = outcome.theta_r2[:, 0].mean()
    refused = [outcome.counts[:, code].sum() for code in Status if code.rejects]
    line["part_refused"] = sum(refused) / outcome.counts.sum()
    runs = row.setting.episodes * TASKS
    return line | {
        "gradients_per_run": spent.gradients / runs,
        "products_per_run": spent.products / runs,
    }


def _pair(name: str, values: np.ndarray) -> dict[str, float]:
    summary = interval(values)
    low, high = summary.ci95
    return {name: float(summary.mean), f"{name}_half": float((high - low) / 2)}


def told(line: Mapping[str, Any]) -> str:
    """A line of progress."""
    text = f"{line['row']}: test error {line['test_mse']:.3f} +- {line['test_mse_half']:.3f}"
    if line["published"]:
        text += f" (published {line['published']:.3f} +- {line['published_half']:.3f})"
    for other in ("one_step", "fo"):
        if line[f"minus_{other}"] != "":
            mean, half = line[f"minus_{other}"], line[f"minus_{other}_half"]
            text += f", minus {other} {mean:+.3f} +- {half:.3f}"
    if line["diverged"]:
        text += f", median {line['median']:.3f}, {line['diverged']} seeds diverged"
    if np.isfinite(line["theta_fit"]):
        text += f", theta fitted {line['theta_least']:.2f} to {line['theta_most']:.2f}"
    return text


def write_thetas(lines: Sequence[Row], outcomes: Mapping[str, Outcome], path: Path) -> None:
    """A row per HyperDistill, seed and episode."""
    table = [
        [row.name, seed, m + 1, theta, found.theta_fit[seed, m], found.theta_r2[seed, m]]
        for row in lines
        if row.method == "hyperdistill"
        for found in [outcomes[row.name]]
        for (seed, m), theta in np.ndenumerate(found.theta)
    ]
    write_csv(path, ["row", "seed", "episode", "theta", "theta_fit", "theta_r2"], table)
