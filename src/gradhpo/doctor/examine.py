"""All experiments on a task, its methods measured, and what follows."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.diagnostics.check import check_hypergradient
from gradhpo.diagnostics.rows import Row
from gradhpo.doctor.experiments import OF_TASKS, OF_TRAINING
from gradhpo.doctor.faults import Fault, Unseen
from gradhpo.doctor.of_data import UNEVEN
from gradhpo.doctor.patient import Patient, patient_of
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.training import Hook, Length, left_alone, trained
from gradhpo.utils.settings import check_count, check_positive

__all__ = ["METHODS", "Diagnosis", "Measured", "doctor"]

METHODS = ("one_step", "t1t2", "greedy", "hyperdistill", "drmad", "implicit_cg", "reverse")
TIMED = 9  # episodes, after one that compiles
GOOD = 0.9  # cosine, from which a method points where the hypergradient does
REACH = 3.0  # in what is stored: what a hyperparameter should be able to move in a run; e^3 = 20


class Measured(NamedTuple):
    """A method on this task."""

    row: Row  # against the exact hypergradient, in float64
    seconds: float  # of an episode
    times: float  # as long as training alone


class Diagnosis(NamedTuple):
    """What was found; `print` it."""

    steps: int
    held: list[str]  # what is as it should be
    unseen: list[str]  # what could not be looked at, and why
    faults: list[Fault]
    methods: dict[str, Measured]
    skipped: list[str]  # methods for which there was no time
    training: float  # seconds of an episode of training alone; NaN: not measured
    advice: str
    seconds: float

    def __str__(self) -> str:
        lines = [f"ok     {each}" for each in self.held]
        lines += [f"--     {each}" for each in self.unseen]
        lines += [f"{'FAULT' if each.sure else 'LOOK '}  {each}" for each in self.faults]
        if self.methods:
            lines += ["", *_table(self)]
        if self.skipped:
            lines += ["", f"no time was left for {', '.join(self.skipped)}; --limit gives more"]
        lines += ["", self.advice] if self.advice else []
        return "\n".join(lines)


def doctor(
    task: Task | Callable[[], Task],
    steps: int = 20,
    *,
    episodes: int = 50,
    methods: Sequence[str] = METHODS,
    limit: float = 120.0,
    progress: Progress = silent,
) -> Diagnosis:
    """Look for faults of a task, and measure methods on it.

    Args:
        task: The task, or a function of no argument that makes it anew, by which sources that are
            functions begin at their first batch.
        steps: T of an episode; the exact hypergradient goes through all of it.
        episodes: Of the run that is meant, for the advice on the outer rate.
        methods: By name, as in `gradhpo list`.
        limit: Seconds; no method is begun that would end later if it took as long as the slowest
            before it.
        progress: Told before what takes time.

    Raises:
        TypeError, ValueError: the task cannot be run at all; the message says why.
    """
    make = (lambda: task) if isinstance(task, Task) else task
    limit, began = check_positive("limit", limit), time.monotonic()
    steps = Length(1, check_count("steps", steps)).of(make()).steps
    held: list[str] = []
    unseen: list[str] = []
    faults: list[Fault] = []

    def look(experiments: Mapping[str, Callable[[Any], Iterable[Any]]], at: Any) -> None:
        for title, experiment in experiments.items():
            if time.monotonic() - began > limit:
                unseen.append(f"{title}: no time was left")
                continue
            progress(f"looking whether {title} ...")
            found = list(experiment(at))
            faults.extend(each for each in found if isinstance(each, Fault))
            unseen.extend(f"{title}: {each.why}" for each in found if isinstance(each, Unseen))
            held.extend([] if found else [title])

    look(OF_TASKS, make)
    if any(fault.name == UNEVEN for fault in faults):  # no episode can be drawn
        spent = time.monotonic() - began
        return Diagnosis(steps, held, unseen, faults, {}, [], math.nan, "", spent)
    patient = patient_of(make, steps)
    look(OF_TRAINING, patient)
    measured: dict[str, Measured] = {}
    skipped: list[str] = []
    training = math.nan
    if not any(fault.sure for fault in faults) and time.monotonic() - began < limit:
        training = _seconds(lambda length, hook: left_alone(make(), length, hook), steps)
        taken = 0.0  # by the last method, nearly all of it compilation: what the next one may take
        for name in methods:
            spent = time.monotonic() - began
            if spent + taken > limit:
                skipped.append(name)
                continue
            about = f", about {taken:.0f} s" if taken else ""
            progress(f"measuring {name}{about} ({spent:.0f} of {limit:.0f} s are spent) ...")
            measured[name] = _measured(patient, name, training)
            taken = max(taken, time.monotonic() - began - spent)
    elif not any(fault.sure for fault in faults):
        skipped.extend(methods)
    advice = _advice(patient, measured, episodes)
    seconds = time.monotonic() - began
    return Diagnosis(steps, held, unseen, faults, measured, skipped, training, advice, seconds)


def _seconds(train: Callable[[Length, Hook], Any], steps: int) -> float:
    """Of an episode, the median; the first one compiles. NaN: the batches end before."""
    ends: list[float] = []
    train(Length(1 + TIMED, steps), lambda row: ends.append(time.monotonic()))
    return float(np.median(np.diff(ends))) if len(ends) > 1 else math.nan


def _measured(patient: Patient, name: str, training: float) -> Measured:
    row = check_hypergradient(patient.make(), patient.steps, [name]).rows[name]
    if row.refused:
        return Measured(row, math.nan, math.nan)
    method, outer = method_of(chosen(name), patient.steps), optax.sgd(1e-3)  # fits every space

    def train(length: Length, hook: Hook) -> Any:
        return trained(patient.make(), method, outer, length, hook=hook)

    seconds = _seconds(train, patient.steps)
    return Measured(row, seconds, seconds / training)


def _table(found: Diagnosis) -> list[str]:
    head = ["method", "cosine", "norm ratio", "ms an episode", "times training", "temp bytes"]
    rows = [head]
    for name, (row, seconds, times) in found.methods.items():
        if row.refused:
            rows.append([name, "refused: " + row.refused, *[""] * 4])
            continue
        numbers = [f"{row.cosine:.3f}", f"{row.norm_ratio:.3g}", f"{1e3 * seconds:.3g}"]
        memory = "" if row.temp_bytes is None else f"{row.temp_bytes:,}"
        rows.append([name, *numbers, f"{times:.2g}", memory])
    plain = [row for row in rows if not row[1].startswith("refused")]
    widths = [max(len(row[i]) for row in plain) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [
        f"the hypergradient of {found.steps} steps; training alone takes "
        f"{1e3 * found.training:.3g} ms an episode",
        "",
    ]
    for row in rows:
        if row[1].startswith("refused"):
            lines.append(f"{row[0]:{widths[0]}}  {row[1]}")
        else:
            cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells]))
    return lines


def _advice(patient: Patient, measured: dict[str, Measured], episodes: int) -> str:
    """A method, and an outer rate, with the reason."""
    cosines = {name: each.row.cosine for name, each in measured.items() if not each.row.refused}
    usable = {
        name: each
        for name, each in measured.items()
        if each.row.status == Status.OK and each.row.cosine > 0
    }
    if not cosines:
        return ""
    if not usable:
        why = (
            "the exact hypergradient is zero here, and there is nothing to compare with"
            if np.isnan(list(cosines.values())).all()
            else "none of these methods points where the hypergradient does"
        )
        return f"no advice: {why}."
    good = {name: each for name, each in usable.items() if each.row.cosine >= GOOD}
    if good:
        name = min(good, key=lambda name: good[name].seconds)
        why = f"the fastest of those whose cosine is at least {GOOD}"
    else:
        name = max(usable, key=lambda name: usable[name].row.cosine)
        why = f"none has a cosine of {GOOD}; it has the highest"
    windows = method_of(chosen(name), patient.steps)("scan").unroll_steps
    updates = max(1, episodes * patient.steps // windows)
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(patient.lam))
    few = " With so few hyperparameters compare it with tpe: gradhpo compare." if size <= 5 else ""
    return f"advice: {name}, {why}. {_outer_rate(patient, updates, episodes)}{few}"


def _outer_rate(patient: Patient, updates: int, episodes: int) -> str:
    """A rate for Adam, whose steps have one length for all hyperparameters."""
    spaces = patient.task.declared
    leaves = jax.tree.leaves(patient.lam)
    natural = [True] * len(leaves) if spaces is None else [s.natural for s in spaces.spaces]
    sizes = [
        np.median(np.abs(x)) for x, is_natural in zip(leaves, natural, strict=True) if is_natural
    ]
    reach = min([REACH, *(float(size) for size in sizes if size > 0)])
    rate = float(np.clip(reach / updates, 1e-6, 0.3))
    moves = f"in {episodes} episodes it takes {updates} updates and can move a hyperparameter by "
    by = f"{rate * updates:.2g}"
    if not sizes:
        return f"Outer rate {rate:.1g} for Adam: {moves}{by} as it is stored."
    return (
        f"Outer rate {rate:.1g} for Adam: {moves}{by}. Some are in natural scale, where one step "
        "is too long for the small ones or too short for the large: declare spaces.log() for what "
        "is positive."
    )
