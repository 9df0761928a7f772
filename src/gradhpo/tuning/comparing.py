"""Methods on one task at an equal number of gradients, those that see values alone among them.

A method that follows hypergradients trains again and again from the task's start, and its
hyperparameters go on from training to training. A search draws hyperparameters for every training,
within a box around where the others start. What counts is the lowest validation loss at the end of
a training so far, and the test loss of the same model.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper
from gradhpo.driver.caches import kept
from gradhpo.driver.failure import OnFailure
from gradhpo.report import StudyResult, summarize
from gradhpo.report.config import Progress, silent
from gradhpo.report.drawing import new_axes, new_figure, save
from gradhpo.report.lines import Line, draw_lines
from gradhpo.tuning.methods import Chosen, chosen, method_of
from gradhpo.tuning.places import NOWHERE, Done, Place, Sequence
from gradhpo.tuning.searches import SEARCHES, as_gradients, require_optuna, search_box
from gradhpo.tuning.target import check_begins_anew
from gradhpo.tuning.training import (
    Length,
    Method,
    Trial,
    holding,
    judged,
    left_alone,
    trained,
)
from gradhpo.utils.validation import check_choice, check_count, check_positive

__all__ = [
    "OUTER",
    "Training",
    "at",
    "best",
    "by_hypergradients",
    "by_search",
    "compare",
    "cost",
    "ended",
    "figure",
    "lowest",
    "so_far",
    "with_trial",
]

OUTER = {"adam": optax.adam, "sgd": optax.sgd}
WIDTH = 3.0
PARTS = 40  # of the budget, at whose ends the lowest loss so far is noted

Make = Callable[[int], Task]


class Training(NamedTuple):
    """One of the trainings that a budget has paid for."""

    spent: float  # gradients, up to its end
    done: Done
    trained: Trial | None  # None: in an earlier process, and its state is not kept
    drawn: Hyper = None  # what a search has drawn, as a state would hold it

    @property
    def judged(self) -> dict[str, float]:
        """How it ended."""
        return self.done.judged

    @property
    def trial(self) -> Trial:
        """The training itself, where it is at hand: always, if nothing is kept."""
        assert self.trained is not None
        return self.trained

    @property
    def earlier(self) -> float:
        """Seconds that it took in earlier processes."""
        return self.done.seconds if self.trained is None else self.trained.earlier


def ended(spent: float, trial: Trial, drawn: Hyper = None) -> Training:
    """A training that is over."""
    hyperparams = trial.history.named(trial.state.hyperparams)
    done = Done(judged(trial), hyperparams, *trial.cost, trial.seconds, trial.ended == "stopped")
    return Training(spent, done, trial, drawn)


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
    length = Length(check_count("episodes", episodes), check_count("steps", steps)).of(make(0))
    names = tuple(methods)
    budget, rate = check_positive("budget", budget), check_positive("outer_rate", outer_rate)
    by = OUTER[check_choice("outer", outer, tuple(OUTER))]
    if not names:
        raise ValueError("compare needs at least one method.")
    if {chosen(name).name for name in names} & set(SEARCHES):
        require_optuna()
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
                own.thin(spared={0} if seed == 0 else ())  # by which a changed task is found out
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
    price = length.episodes * length.steps
    _check_paid(budget // price, price, budget, name)
    return by_search(make, name, length, int(budget // price), seed, width, place=place)


@kept
def _outer(
    by: Callable[[float], optax.GradientTransformation], rate: float
) -> optax.GradientTransformation:
    """One object for all seeds, so that they share a program."""
    return by(rate)


def by_hypergradients(
    make: Make,
    method: Chosen,
    outer: optax.GradientTransformation,
    length: Length,
    budget: float,
    seed: int = 0,
    on_failure: OnFailure = "skip",
    place: Place = NOWHERE,
) -> Iterator[Training]:
    """Trainings one after the other, the hyperparameters of each where the last one left them.

    Args:
        place: Where they are kept; those that have been there go on, in this very order.

    Raises:
        ValueError: the budget does not pay for one.
    """
    sequence, estimator, spent = Sequence(place), method_of(method, length.steps), 0.0

    def train(i: int, state: BilevelState | None) -> Trial:
        """Training `i`, after one that ended with this state."""
        task = make(seed)
        start = None if state is None else _restarted(task, estimator, outer, state)
        return _whole(
            trained(
                task,
                estimator,
                outer,
                length,
                state=start,
                seed=seed,
                on_failure=on_failure,
                place=sequence.place(i),
            )
        )

    def end_of(last: int) -> BilevelState:
        """What a training of an earlier process has left, from the last state that is kept; the
        first one has the structure of all."""
        state, kept = train(0, None).state, sequence.newest(last)
        while kept:
            found = sequence.restore(kept, state)
            if int(found.episode) == length.episodes:  # else its end is damaged
                state = found
                break
            kept = sequence.newest(kept - 1)
        for i in range(kept + 1, last + 1):
            state = train(i, state).state
        return state

    state: BilevelState | None = None
    for i in itertools.count():
        price = _price(make(seed), estimator, length)
        if spent + price > budget:
            _check_paid(spent, price, budget, method.name)
            return
        spent += price
        known = sequence.done(i)
        if known is not None and (i or not sequence.kept(i)):
            yield Training(spent, known, None)
            if known.stopped:
                return
            continue
        if i and state is None:
            state = end_of(i - 1)
        training = ended(spent, train(i, state))
        sequence.add(i, training.done, needed=i)
        state = None if sequence.done(i + 1) else training.trial.state
        yield training
        if training.done.stopped:
            return


def by_search(
    make: Make,
    name: str,
    length: Length,
    trials: int,
    seed: int = 0,
    width: float = WIDTH,
    seen: Callable[[Training], object] = lambda training: None,
    place: Place = NOWHERE,
) -> list[Training]:
    """Trainings with hyperparameters that a search draws; the first one is of the start.

    Args:
        trials: How many.
        width: See `compare`.
        seen: Told of each training that is done.
        place: Where they are kept; those that have been there are known, and the sampler is told
            of them again.

    Raises:
        KeyboardInterrupt: at the first Ctrl-C.
    """
    first, price = make(seed), length.episodes * length.steps
    stored = first.stored.hyperparams
    flat, back = ravel_pytree(stored)
    done: list[Training] = []
    sequence = Sequence(place)

    def judge(setting: np.ndarray) -> float:
        task, drawn = make(seed), back(jnp.asarray(setting, flat.dtype))
        if task.declared is not None:
            drawn = task.declared.project(drawn)
        i, spent = len(done), price * (len(done) + 1)
        known = sequence.done(i)
        if known is not None and not sequence.kept(i):
            done.append(Training(spent, known, None, drawn))
        else:
            held, own = holding(task, task.settled(drawn)), sequence.place(i)
            trial = _whole(left_alone(held, length, seed=seed, place=own))
            done.append(ended(spent, trial, drawn))
            sequence.add(i, done[-1].done, needed=best(done))
        seen(done[-1])
        return done[-1].judged["val_loss"]

    search_box(name, np.asarray(flat, float), width, judge, trials, seed)
    return done


def with_trial(training: Training, make: Make, length: Length, seed: int) -> Training:
    """One of a search; it is trained again if an earlier process has done it and kept no state."""
    if training.trained is not None:
        return training
    task = make(seed)
    trial = _whole(left_alone(holding(task, task.settled(training.drawn)), length, seed=seed))
    return training._replace(trained=trial)


def best(done: list[Training]) -> int:
    """The number of the training with the lowest validation loss, the first of equals."""
    return min(range(len(done)), key=lambda i: _loss(done[i].judged["val_loss"]))


def lowest(done: list[Training]) -> Training:
    """The training with the lowest validation loss."""
    return done[best(done)]


def at(task: Task, method: Method, outer: Any, hyperparams: Hyper) -> BilevelState:
    """The start of a training with these hyperparameters, as a state holds them."""
    stored = task.stored
    return init_state(
        stored.problem,
        method("scan"),
        outer,
        stored.params,
        hyperparams,
        model_state=stored.model_state,
    )


def _restarted(task: Task, method: Method, outer: Any, state: BilevelState) -> BilevelState:
    """The start of another training; hyperparameters, their slots and the memory stay."""
    return replace(
        at(task, method, outer, state.hyperparams),
        outer_opt_state=state.outer_opt_state,
        memory=state.memory,
        metadata=state.metadata,
    )


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


def _price(task: Task, method: Method, length: Length) -> float:
    """Of a training by a method, in gradients."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(task.hyperparams))
    return as_gradients(method("scan").cost(length.steps, size, episodes=length.episodes))


def _check_paid(done: float, price: float, budget: float, name: str) -> None:
    if not done:
        raise ValueError(
            f"one training by {name} takes {price:,.0f} gradients, more than the budget of "
            f"{budget:,.0f}: raise the budget, or shorten the training."
        )


def _whole(trial: Trial) -> Trial:
    if trial.error is not None:
        raise trial.error
    return trial


def cost(done: list[Training]) -> tuple[float, float]:
    """Gradients and second-order products of all trainings."""
    each = [training.done.cost for training in done]
    return sum(cost.gradients for cost in each), sum(cost.products for cost in each)


def _loss(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def so_far(done: list[Training], budget: float) -> np.ndarray:
    """The lowest loss of the trainings that have ended at each part of the budget."""
    spent = np.array([each.spent for each in done])
    lowest = np.minimum.accumulate([_loss(each.judged["val_loss"]) for each in done])
    ended = np.searchsorted(spent, budget * np.arange(1, PARTS + 1) / PARTS, side="right")
    return np.where(ended > 0, lowest[np.maximum(ended, 1) - 1], np.nan)


def _stacked(seeds: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]}
