"""Methods on one task at an equal number of gradients, those that see values alone among them.

What counts is the lowest validation loss at the end of a training so far, and the test loss of the
same model. How methods and searches go from training to training is in `sequences`.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from gradhpo.core.task import Task
from gradhpo.driver.caches import cached
from gradhpo.driver.failure import OnFailure
from gradhpo.report import StudyResult, summarize
from gradhpo.report.config import Progress, silent
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.tuning.methods import Chosen, chosen
from gradhpo.tuning.places import NOWHERE, Place
from gradhpo.tuning.searches import SEARCHES, require_optuna
from gradhpo.tuning.sequences import (
    WIDTH,
    Make,
    Training,
    by_hypergradients,
    by_search,
    check_pays,
    cost,
    lowest,
)
from gradhpo.tuning.target import check_begins_anew
from gradhpo.tuning.training import Length
from gradhpo.utils.settings import check_choice, check_count, check_positive

__all__ = ["OUTER", "compare", "figure", "so_far"]

OUTER = {"adam": optax.adam, "sgd": optax.sgd}
PARTS = 40  # of the budget, at whose ends the lowest loss so far is noted


def compare(
    task: Task | Make,
    methods: Iterable[str],
    budget: float,
    *,
    episodes: int,
    steps: int,
    seeds: int = 1,
    outer_rate: float = 0.02,
    outer: str = "adam",
    width: float = WIDTH,
    on_failure: OnFailure = "skip",
    title: str = "compare",
    progress: Progress = silent,
    place: Callable[[str], Place] = lambda name: NOWHERE,
) -> StudyResult:
    """Methods on one task, each for the same number of gradients.

    Args:
        task: The task, or a function from the number of a seed to it.
        methods: Names of registered methods, with settings where there are any
            ("hyperdistill:gamma=0.9,outer_rate=0.1"), and of searches, "random", "tpe", "cmaes";
            differences are to the first one.
        budget: Gradients of a loss that each may take in a seed; a product of second order counts
            as two.
        episodes, steps: Of one training: so many episodes of T steps; T is known of tasks whose
            episodes bring their batches.
        seeds: Repetitions, from seed 0.
        outer_rate: Step size on what is stored of the hyperparameters, by
        outer: "adam" or "sgd".
        width: A search draws from this far to both sides of the start, in what is stored: 3 is a
            factor of 20 in both directions for `spaces.log()`.
        on_failure: Of trainings by hypergradients, see `gradhpo.tune`: one that is stopped is the
            last of its method and seed.
        title: Stands above the table.
        progress: Told of every method that is done.
        place: Where its trainings are kept, by a name for every seed and method.

    Returns:
        A result to print (`gradhpo.report.table`) or write: `val_loss` and `test_loss` of the model
        with the lowest validation loss, and `val_loss_by_epoch`, the lowest so far at 40 equal
        parts of the budget (NaN before the first training has ended).

    Raises:
        ValueError: a budget that is less than one training; an unknown method.
        ImportError: a search without Optuna.
        UpdateRejected: with `on_failure="raise"`.
        Exception, KeyboardInterrupt: of the task, at the first Ctrl-C. If seeds were done by then,
            what they have found is in `error.result`.

    >>> import jax.numpy as jnp
    >>> from gradhpo import BilevelProblem, InOrder, from_update, report
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    ... )
    >>> task = Task(problem, 2.0, 0.5, InOrder(jnp.ones(5)), InOrder(jnp.zeros(5)))
    >>> found = compare(task, ["one_step", "reverse"], 50, episodes=1, steps=5)
    >>> found.methods["one_step"].gradient_evaluations, found.methods["reverse"].metrics.keys()
    (20, dict_keys(['val_loss', 'val_loss_by_epoch']))
    """
    if isinstance(task, Task):
        check_begins_anew("the task", task)
    make = (lambda seed: task) if isinstance(task, Task) else task
    length = Length(check_count("episodes", episodes), check_count("steps", steps))
    first = make(0)
    length = length.of(first)
    names = tuple(methods)
    budget, rate = check_positive("budget", budget), check_positive("outer_rate", outer_rate)
    by = OUTER[check_choice("outer", outer, tuple(OUTER))]
    if not names:
        raise ValueError("compare needs at least one method.")
    if {chosen(name).name for name in names} & set(SEARCHES):
        require_optuna()
    for name in names:
        check_pays(budget, first, chosen(name), length)
    began, earlier = time.monotonic(), 0.0
    values: list[dict[str, dict[str, Any]]] = []  # of a seed, by method
    costs: dict[str, tuple[float, float]] = {}
    settings = {"budget": budget, **length._asdict(), "seeds": seeds, "outer": outer}

    def result() -> StudyResult:
        of_method = {name: _stacked([seed[name] for seed in values]) for name in names}
        return StudyResult(
            title,
            settings | {"outer_rate": outer_rate, "width": width},
            summarize(of_method, costs, baseline=names[0] if len(names) > 1 else None),
            time.monotonic() - began + earlier,
        )

    try:
        for seed in range(check_count("seeds", seeds)):
            found: dict[str, dict[str, Any]] = {}
            for i, name in enumerate(names):
                method = chosen(name)
                own = place(f"seed{seed}-{method.name}-{i}")
                done = list(
                    _trainings(make, method, by, rate, length, budget, seed, width, on_failure, own)
                )
                own.thin(spared={0})  # by which a changed task is found out
                judged, costs[name] = lowest(done).judged, cost(done)
                earlier += sum(each.earlier for each in done)
                found[name] = judged | {"val_loss_by_epoch": so_far(done, budget)}
                at_end = "  ".join(f"{key} {value:.4g}" for key, value in judged.items())
                progress(f"seed {seed}, {name}: {at_end}  ({len(done)} trainings)")
            values.append(found)
    except (Exception, KeyboardInterrupt) as error:
        if values:
            error.result = result()  # type: ignore[attr-defined]
        raise
    return result()


def _trainings(
    make: Make,
    method: Chosen,
    by: Callable[[float], optax.GradientTransformation],
    rate: float,
    length: Length,
    budget: float,
    seed: int,
    width: float,
    on_failure: OnFailure,
    place: Place,
) -> Iterable[Training]:
    name = method.name
    if name not in SEARCHES:
        outer = _outer(by, method.outer_rate or rate)
        return by_hypergradients(make, method, outer, length, budget, seed, on_failure, place)
    trials = int(budget // (length.episodes * length.steps))
    return by_search(make, name, length, trials, seed, width, place=place)


@cached
def _outer(
    by: Callable[[float], optax.GradientTransformation], rate: float
) -> optax.GradientTransformation:
    """One object for all seeds, so that they share a program."""
    return by(rate)


def figure(result: StudyResult, path: Path) -> Path:
    """The lowest validation loss so far against the gradients spent."""
    spent = result.settings["budget"] * np.arange(1, PARTS + 1) / PARTS
    lines = {}
    for name, method in result.methods.items():
        lowest = method.metrics["val_loss_by_epoch"]
        lines[name] = Line(spent, lowest.mean, *lowest.ci95)
    drawn = new_figure(6.4, 4.0)
    title = "Lowest validation loss of the trainings so far"
    draw_lines(new_axes(drawn, title, "gradients spent", ""), lines)
    return save(drawn, path)


def so_far(done: list[Training], budget: float) -> np.ndarray:
    """The lowest loss of the trainings that have ended at each part of the budget."""
    spent = np.array([each.spent for each in done])
    lowest = np.minimum.accumulate([each.loss for each in done])
    ended = np.searchsorted(spent, budget * np.arange(1, PARTS + 1) / PARTS, side="right")
    return np.where(ended > 0, lowest[np.maximum(ended, 1) - 1], np.nan)


def _stacked(seeds: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]}
