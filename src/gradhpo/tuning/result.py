"""What `gradhpo tune` leaves behind: a `StudyResult`, and the files beside it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.core.status import Status
from gradhpo.report import StudyResult, summarize
from gradhpo.report.drawing import save
from gradhpo.tuning.command import ANEW, UNTUNED, Outcome, Seed, Tuned
from gradhpo.tuning.config import TuneConfig
from gradhpo.tuning.figures import figures
from gradhpo.tuning.page import page
from gradhpo.tuning.take_home import FILE, as_json, optimizer_file

__all__ = ["result_of"]


def result_of(config: TuneConfig, tuned: Tuned, command: str) -> StudyResult:
    """Table and files of a run.

    A seed that was cut off is in the logs and in `hyperparams.json`; it is in the table only where
    there is no other.
    """
    trainings = (config.method,) if config.alone else (UNTUNED, config.method, ANEW)
    whole = [seed.outcomes for seed in tuned.seeds if seed.whole(trainings)]
    if not whole:
        trainings = (config.method,)
        whole = [seed.outcomes for seed in tuned.seeds]
    rows = {training: [seed[training] for seed in whole] for training in trainings}
    result = StudyResult(
        config.task,
        config,
        summarize(
            {training: _values(each) for training, each in rows.items()},
            {training: _cost(each) for training, each in rows.items()},
            baseline=UNTUNED if UNTUNED in rows else None,
        ),
        tuned.seconds,
        command=command,
    )
    found = _found(config, tuned)
    drawn = figures(rows, config.method)
    files: dict[str, Callable[[Path], object]] = {
        FILE: lambda path: path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    }
    problem = rows[config.method][0].trial.task.problem
    if problem.dynamics.parts is not None:
        text = optimizer_file(config.task, config.set)
        files["optimizer.py"] = lambda path: path.write_text(text)
    files["report.html"] = lambda path: path.write_text(page(result, found, drawn), "utf-8")
    files |= {
        f"{title}.png": lambda path, make=make: save(make(), path) for title, make in drawn.items()
    }
    return replace(result, files=files)


def _values(rows: list[Outcome]) -> dict[str, Any]:
    """The metrics of a training: at its end for every seed, and losses by episode."""
    at_end = {name: [row.judged[name] for row in rows] for name in rows[0].judged}
    curves = [row.trial.history.metrics for row in rows]
    longest = max(len(curve["val_loss"]) for curve in curves)
    by_episode = {
        f"{name}_by_epoch": np.stack([_held(curve[name], longest) for curve in curves])
        for name in curves[0]
        if name.startswith("val_")
    }
    return at_end | by_episode


def _held(values: np.ndarray, length: int) -> np.ndarray:
    """A curve that ended early, at its last value to the end of the others."""
    return np.concatenate([values, np.full(length - len(values), values[-1])])


def _cost(rows: list[Outcome]) -> tuple[float, float]:
    gradients, products = np.mean([row.trial.cost for row in rows], axis=0).tolist()
    return gradients, products


def _found(config: TuneConfig, tuned: Tuned) -> dict[str, Any]:
    """The content of `hyperparams.json`."""
    seeds = {str(i): seed for i, seed in enumerate(tuned.seeds)}
    losses = {i: seed.outcomes[config.method].judged["val_loss"] for i, seed in seeds.items()}
    return {
        "task": config.task,
        "method": config.method,
        "best_seed": int(min(losses, key=lambda i: np.nan_to_num(losses[i], nan=np.inf))),
        "seeds": {i: _of_seed(seed, config.method) for i, seed in seeds.items()},
    }


def _of_seed(seed: Seed, method: str) -> dict[str, Any]:
    trial, judged = seed.outcomes[method]
    counts = np.asarray(trial.state.counts)
    return {
        "values": as_json(trial.hyperparams),
        "from": as_json(seed.start),
        "to": as_json(trial.history.values(trial.state.hyperparams)),
        "judged": as_json(judged),
        "episodes": int(trial.state.episode),
        "ended": trial.ended or "after all episodes",
        "status": {each.name: int(counts[each]) for each in Status if counts[each]},
    }
