"""The methods of the study: what each finds on one seed, and after how many gradients."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.estimators.reverse import reverse
from gradhpo.studies.mixed.problem import ACTIVATIONS, WIDTHS, Data, start
from gradhpo.studies.mixed.training import CHOICES, Followed, decided, follow, judged, spaces_of
from gradhpo.tuning.searches import STUDIED, as_gradients, search

__all__ = ["METHODS", "RATES", "Budget", "Found", "Seed", "judge"]

RATES = 0.3, 0.1  # of Adam: relaxed and held; both where choices are enumerated
BOX = {"rate": (5e-3, 1.0), "pixel": (1e-5, 0.1), "penalty": (1e-5, 0.1)}  # of the searches
NAMES = {"activation": tuple(ACTIVATIONS), "width": WIDTHS}


class Budget(NamedTuple):
    """How long the methods run."""

    steps: int  # T, of an episode and of a trial
    relaxed: int  # episodes
    held: int  # episodes after these
    enumerated: int  # episodes with every choice, at each of the rates
    trials: int


class Found(NamedTuple):
    """What a method found on one seed."""

    hyperparams: dict[str, Any]  # in natural scale, choices as rows of 0 and 1
    evaluations: np.ndarray  # gradients of the training loss up to each value
    values: np.ndarray  # validation losses of decided settings; infinite while choices are mixed
    relaxed: float = np.nan  # the lowest validation loss of mixtures

    @property
    def choice(self) -> tuple[Any, ...]:
        """The names of what was chosen."""
        return tuple(NAMES[name][int(np.argmax(self.hyperparams[name]))] for name in CHOICES)

    @property
    def best(self) -> np.ndarray:
        """The lowest value so far."""
        return np.minimum.accumulate(np.where(np.isfinite(self.values), self.values, np.inf))

    def reached(self, value: float) -> float:
        """Evaluations until a value as low as this one; infinite if there was none."""
        there = np.flatnonzero(self.best <= value)
        return float(self.evaluations[there[0]]) if len(there) else np.inf


class Seed(NamedTuple):
    """All that a method starts from."""

    params: Any
    data: Data
    keys: jax.Array  # the noise of dropout, one a step
    number: int


def _by_reverse(budget: Budget, seed: Seed) -> Found:
    """Relaxed, decided at the best of its episodes, and on from there."""
    spaces = spaces_of(seed.data)
    stored = spaces.store(start(_pixels(seed)))
    mixed = _follow(budget, budget.relaxed, RATES[0], stored, seed)
    at = int(np.nanargmin(mixed.val_loss))
    best = jax.tree.map(lambda x: x[at], mixed.stored)
    chosen = {name: spaces.settle(best)[name] for name in CHOICES}
    held = _follow(budget, budget.held, RATES[1], decided(best, chosen), seed)
    values = np.concatenate([np.full(budget.relaxed, np.inf), held.val_loss])
    last = jax.tree.map(lambda x: x[int(np.nanargmin(held.val_loss))], held.stored)
    evaluations = _evaluations(budget, seed, len(values))
    return Found(spaces.value(last), evaluations, values, float(mixed.val_loss[at]))


def _by_enumeration(budget: Budget, seed: Seed) -> Found:
    """Every choice with its numbers tuned, the better of two rates."""
    spaces = spaces_of(seed.data)
    stored = spaces.store(start(_pixels(seed)))
    each = [
        decided(stored, dict(zip(CHOICES, (jnp.eye(3)[i], jnp.eye(3)[j]), strict=True)))
        for i, j in product(range(3), repeat=2)
    ]
    # One after the other: nine at once would not fit into the cache of a core.
    runs = [
        _follow(budget, budget.enumerated, rate, one, seed) for one, rate in product(each, RATES)
    ]
    values = np.concatenate([run.val_loss for run in runs])
    best = min(runs, key=lambda run: float(np.nanmin(run.val_loss)))
    last = jax.tree.map(lambda x: x[int(np.nanargmin(best.val_loss))], best.stored)
    evaluations = _evaluations(budget, seed, len(values))
    return Found(spaces.value(last), evaluations, values)


def _evaluations(budget: Budget, seed: Seed, episodes: int) -> np.ndarray:
    """Gradients up to the end of every episode, or of every enumerated one."""
    of_one = as_gradients(reverse(budget.steps).cost(budget.steps, _pixels(seed)))
    return of_one * (1 + np.arange(episodes))


def _by_search(method: str, budget: Budget, seed: Seed) -> Found:
    begin = start(_pixels(seed))

    def suggest(trial: Any) -> dict[str, Any]:
        lam: dict[str, Any] = {
            name: np.eye(3, dtype=np.float32)[trial.suggest_categorical(name, [0, 1, 2])]
            for name in CHOICES
        }
        for name, (low, high) in BOX.items():
            drawn = [
                trial.suggest_float(f"{name}{i}", low, high, log=True)
                for i in range(len(begin[name]))
            ]
            lam[name] = np.array(drawn, np.float32)
        return lam | {"dropout": np.float32(trial.suggest_float("dropout", 0.0, 0.9))}

    first = {f"{name}{i}": float(x) for name in BOX for i, x in enumerate(begin[name])}
    first |= {"dropout": float(begin["dropout"])}
    got = search(
        method,
        suggest,
        lambda lam: judge(budget, seed, lam)[0],
        budget.trials,
        seed.number,
        first,
    )
    return Found(got.best, budget.steps * (1 + np.arange(budget.trials)), got.values)


def _follow(budget: Budget, episodes: int, rate: float, stored: Any, seed: Seed) -> Followed:
    return jax.device_get(
        follow(budget.steps, episodes, rate, stored, seed.params, seed.data, seed.keys)
    )


def judge(budget: Budget, seed: Seed, lam: Any) -> tuple[float, float]:
    val, test = judged(budget.steps, lam, seed.params, seed.data, seed.keys)
    return float(val), float(test)


def _pixels(seed: Seed) -> int:
    return int(jnp.shape(seed.data.train.inputs)[1])


METHODS: dict[str, Callable[[Budget, Seed], Found]] = {
    "reverse": _by_reverse,
    "enumeration": _by_enumeration,
    **{name: partial(_by_search, name) for name in STUDIED},
}
