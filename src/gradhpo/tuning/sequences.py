"""Trainings of a task one after the other, tuned by hypergradients or drawn by a search.

A method that follows hypergradients trains again and again from the task's start, and its
hyperparameters go on from training to training. A search draws hyperparameters for every training,
within a box around where the others start.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradhpo.checkpoint.errors import CheckpointMismatch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper
from gradhpo.driver.failure import OnFailure
from gradhpo.tuning.history import History
from gradhpo.tuning.journal import Done
from gradhpo.tuning.judging import judged
from gradhpo.tuning.methods import Chosen, method_of
from gradhpo.tuning.places import NOWHERE, Place, Sequence
from gradhpo.tuning.searches import SEARCHES, as_gradients, search_box
from gradhpo.tuning.training import Length, Method, Trial, holding, left_alone, trained
from gradhpo.utils._differences import differences

__all__ = [
    "WIDTH",
    "Make",
    "Training",
    "at",
    "best",
    "by_hypergradients",
    "by_search",
    "check_pays",
    "cost",
    "ended",
    "lowest",
    "with_trial",
]

WIDTH = 3.0  # of a box to both sides, in what is stored of the hyperparameters

Make = Callable[[int], Task]
"""From the number of a seed to its task."""


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
    def loss(self) -> float:
        """Its validation loss at the end; infinite if that is no number."""
        value = self.judged["val_loss"]
        return value if np.isfinite(value) else np.inf

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
        CheckpointMismatch: what is kept was found with other hyperparameters.
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
        held, known = holding(task, task.settled(drawn)), sequence.done(i)
        if known is not None:
            _check_drawn(i, known, History(held).named(held.stored.hyperparams))
        if known is not None and not sequence.kept(i):
            done.append(Training(spent, known, None, drawn))
        else:
            trial = _whole(left_alone(held, length, seed=seed, place=sequence.place(i)))
            done.append(ended(spent, trial, drawn))
            sequence.add(i, done[-1].done, needed=best(done))
        seen(done[-1])
        return done[-1].judged["val_loss"]

    search_box(name, np.asarray(flat, float), width, judge, trials, seed)
    return done


def _check_drawn(i: int, known: Done, named: dict[str, float]) -> None:
    """Refuse what an earlier process has found with other hyperparameters. On another machine the
    last bits of these may differ.

    Raises:
        CheckpointMismatch: names them.
    """
    before = known.hyperparams
    near = before.keys() == named.keys() and all(
        math.isclose(value, named[name], rel_tol=1e-4) for name, value in before.items()
    )
    if not near:
        raise CheckpointMismatch(
            f"training {i} of the search was one with {'; '.join(differences(before, named))}: the "
            "task's space, or what the search draws by, is another now. Go on with what it was "
            "begun with, or begin anew in another directory."
        )


def with_trial(training: Training, make: Make, length: Length, seed: int) -> Training:
    """One of a search; it is trained again if an earlier process has done it and kept no state."""
    if training.trained is not None:
        return training
    task = make(seed)
    trial = _whole(left_alone(holding(task, task.settled(training.drawn)), length, seed=seed))
    return training._replace(trained=trial)


def best(done: list[Training]) -> int:
    """The number of the training with the lowest validation loss, the first of equals."""
    return min(range(len(done)), key=lambda i: done[i].loss)


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


def _price(task: Task, method: Method, length: Length) -> float:
    """Of a training by a method, in gradients."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(task.hyperparams))
    return as_gradients(method("scan").cost(length.steps, size, episodes=length.episodes))


def check_pays(budget: float, task: Task, method: Chosen, length: Length) -> None:
    """Refuse a budget that does not pay for one training.

    Raises:
        ValueError: names the price.
    """
    price = float(length.episodes * length.steps)
    if method.name not in SEARCHES:
        price = _price(task, method_of(method, length.steps), length)
    if price > budget:
        raise ValueError(
            f"one training by {method.name} takes {price:,.0f} gradients, more than the budget of "
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
