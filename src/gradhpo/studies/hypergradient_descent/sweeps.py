"""The two sweeps of the study `hypergradient_descent`: how much the initial rate matters."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo import datasets
from gradhpo.report import write_csv
from gradhpo.report.config import Progress
from gradhpo.report.parts import once
from gradhpo.studies.hypergradient_descent.figures import passages, tuning
from gradhpo.studies.hypergradient_descent.models import Images
from gradhpo.studies.hypergradient_descent.optimizers import Recipe
from gradhpo.studies.hypergradient_descent.published import GRID, GRID_BASE
from gradhpo.studies.hypergradient_descent.training import BATCH, Curves, iterations_until, train

__all__ = ["Files", "Values", "grid", "online_tuning"]

Values = dict[str, dict[str, Any]]
"""`values[method][metric]` as `summarize` takes them."""
Files = dict[str, Callable[[Path], object]]
"""A function for each file that writes it, as `StudyResult` takes them."""

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BETAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
GOAL = 0.29  # minibatch loss of the grid
TUNED = {  # the last is known to diverge for many an initial rate
    "sgd": Recipe("sgd"),
    "sgd_hd": Recipe("sgd_hd", 1e-4),
    "adam": Recipe("adam"),
    "adam_hd": Recipe("adam_hd", 1e-7),
    "adam_hd, beta 1e-4": Recipe("adam_hd", 1e-4),
}
BASE = {"sgd_hd": "sgd", "sgdn_hd": "sgdn", "adam_hd": "adam", "adam_hd, beta 1e-4": "adam"}


def online_tuning(
    model: str, data: Images, seeds: int, epochs: int, progress: Progress
) -> tuple[Values, Files]:
    """Whole runs from six initial rates; `online.csv`, `online_pairs.csv`, `online.png`."""
    curves = train(model, TUNED, RATES, data, seeds, epochs, progress)
    rows: list[list[Any]] = []
    for name, base in BASE.items():
        if name not in curves:
            continue
        ends = {n: np.array([c.val_loss[:, -1] for c in curves[n]]) for n in (name, base)}
        best = np.nanmin(np.nanmean(np.concatenate([ends[name], ends[base]]), axis=1))
        for k, rate in enumerate(RATES):
            ours, plain = ends[name][k], ends[base][k]
            closer = int(np.sum(np.abs(ours - best) < np.abs(plain - best)))
            bad = _first_nan(curves[name][k])
            row = [float(ours.mean()), float(plain.mean()), float(best), closer, seeds]
            rows.append([name, rate, *row, len(bad), min(bad, default="")])
            progress(
                f"hypergradient_descent: {model}, {name} from {rate:g}: {ours.mean():.4f}, "
                f"{base} {plain.mean():.4f}, best {best:.4f}; closer in {closer} of {seeds}"
                + f"; NaN in {len(bad)}, first at iteration {min(bad, default=0)}"
                * bool(bad)
            )
    title = f"{model}, initial rates 1e-1 to 1e-6"
    files: Files = {
        "online.csv": lambda path: _write_curves(curves, path),
        "online_pairs.csv": lambda path: _write_pairs(rows, path),
        "online.png": lambda path: tuning(curves, path, title),
    }
    return {
        f"{name} from {rate:.0e}": {
            "train_loss_by_epoch": each.train_loss.mean(-1),
            "val_loss_by_epoch": each.val_loss,
        }
        for name, by_rate in curves.items()
        for rate, each in zip(RATES, by_rate, strict=True)
    }, files


def grid(model: str, data: Images, seeds: int, cap: int, progress: Progress) -> Files:
    """Iterations to the goal by initial rate and beta: `grid.csv` and `grid.png`.

    Not reached counts as the cap. Plain Adam runs twice: with steps that fall as 1 / sqrt(t), as
    published, and with the constant rate that Adam-HD starts from, which it is compared with.
    """
    found = {name: np.full((seeds, len(RATES), 1), cap) for name in (*GRID_BASE, "adam")}
    found |= {name: np.full((seeds, len(RATES), len(BETAS)), cap) for name in GRID}
    for seed in range(seeds):
        order = datasets.sample_indices(seed, len(data.train.targets), BATCH, cap)
        for name, values in found.items():
            method, _, decay = name.partition(", ")
            pairs = np.array(
                [*itertools.product(RATES, BETAS if name in GRID else (0.0,))], np.float32
            )
            recipe, (rates, betas) = Recipe(method, decays=bool(decay)), pairs.T
            how = model, recipe, rates, betas, seed, data, order, GOAL
            taken = once(f"grid, seed {seed}, {name}", iterations_until, *how)
            values[seed] = np.where(taken, taken, cap).reshape(values.shape[1:])
            progress(f"hypergradient_descent: grid, seed {seed}, {name} done")
    shown = {name: found[name] for name in GRID}
    return {
        "grid.csv": lambda path: _write_grid(found, seeds, path),
        "grid.png": lambda path: passages(shown, GRID, (RATES, BETAS), cap, path),
    }


def _write_pairs(rows: list[list[Any]], path: Path) -> None:
    """A row per learned rate and initial rate, beside the same method without a learned rate."""
    header = (
        "method initial_rate val_loss base_val_loss best_val_loss closer_seeds seeds "
        "nan_seeds first_nan_iteration"
    )
    write_csv(path, header.split(), rows)


def _write_grid(found: Mapping[str, np.ndarray], seeds: int, path: Path) -> None:
    """A row per method, initial rate and beta, beside the published number."""
    published = {name: np.array(rows, float) for name, rows in GRID.items()}
    published |= {name: np.array(row, float)[:, None] for name, row in GRID_BASE.items()}
    table = []
    for name, values in found.items():
        percentiles = np.percentile(values, (50, 10, 90), axis=0)
        fewer = np.sum(values < found[BASE[name]], axis=0) if name in GRID else None
        for i, j in np.ndindex(*values.shape[1:]):
            theirs = float(published[name][i, j]) if name in published else ""
            wins = "" if fewer is None else int(fewer[i, j])
            beta = BETAS[j] if name in GRID else ""
            numbers = percentiles[:, i, j].tolist()
            table.append([name, RATES[i], beta, *numbers, theirs, wins, seeds])
    header = "method initial_rate beta median low10 high90 published fewer_than_base seeds"
    write_csv(path, header.split(), table)


def _first_nan(curves: Curves) -> list[int]:
    """For every seed that diverged, the first iteration (from 1) whose loss is not finite."""
    losses = curves.train_loss.reshape(len(curves.train_loss), -1)
    return [int(np.argmin(np.isfinite(row))) + 1 for row in losses if not np.isfinite(row).all()]


def _write_curves(curves: Mapping[str, list[Curves]], path: Path) -> None:
    """A row per method, initial rate, seed and epoch; loss and rate are means over its steps."""
    table = []
    for name, by_rate in curves.items():
        for rate, each in zip(RATES, by_rate, strict=True):
            columns = each.train_loss.mean(-1), each.val_loss, each.learning_rate.mean(-1)
            for seed, epoch in np.ndindex(*each.val_loss.shape):
                row = (float(x[seed, epoch]) for x in columns)
                table.append([name, rate, seed, epoch + 1, *row])
    header = "method initial_rate seed epoch train_loss val_loss learning_rate"
    write_csv(path, header.split(), table)
