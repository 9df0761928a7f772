"""Searches that see values alone, to stand beside gradients: random, TPE and CMA-ES, by Optuna.

Optuna's own work for a trial grows with the square of the numbers: for every one it copies all the
others, and CMA-ES draws up to ten times as often as there are numbers until it is in the box, 44
seconds at 10 000. From `MANY` on random draws are therefore NumPy's, and CMA-ES is called in the
package `cmaes` itself, with Optuna's start and width and that package's hundred draws.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gradhpo.core.estimator import Cost

__all__ = [
    "SEARCHES",
    "STUDIED",
    "Searched",
    "as_gradients",
    "require_optuna",
    "search",
    "search_box",
]

SEARCHES = ("random", "tpe", "cmaes")
STUDIED = SEARCHES[:2]  # beside the methods of the studies, some of whose choices are no numbers
MANY = 100  # numbers, from which on CMA-ES keeps a variance for each instead of a matrix
WORST = 1e6  # told of a training that diverged: Optuna's samplers want a number


class Searched(NamedTuple):
    """The trials of a search, in order."""

    values: np.ndarray  # (trials,), infinite where the value was not finite
    settings: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The setting of the lowest value."""
        return self.settings[int(np.argmin(self.values))]


def as_gradients(cost: Cost) -> float:
    """What a method takes, in gradients: a product of second order is counted as two.

    >>> as_gradients(Cost(gradients=22, products=10))
    42
    """
    return cost.gradients + 2 * cost.products


def require_optuna() -> Any:
    """Optuna, or an ImportError with the command to run; called before a long study."""
    try:
        return import_module("optuna")
    except ImportError as error:
        raise ImportError(
            'Searches need Optuna: pip install ".[search]", or name other methods with --method.'
        ) from error


def search(
    method: str,
    suggest: Callable[[Any], dict[str, Any]],
    judge: Callable[[dict[str, Any]], float],
    trials: int,
    seed: int,
    first: Mapping[str, Any],
) -> Searched:
    """Minimise `judge(suggest(trial))`.

    Args:
        method: One of `SEARCHES`.
        suggest: Draws a setting from an `optuna.Trial`.
        first: Parameters of the first trial, by the names that `suggest` gives them: where a
            method that follows gradients starts from as well.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=_sampler(optuna, method, seed))
    study.enqueue_trial(dict(first))
    values, settings = [], []
    for _ in range(trials):
        trial = study.ask()
        settings.append(suggest(trial))
        value = float(judge(settings[-1]))
        values.append(value if math.isfinite(value) else math.inf)
        study.tell(trial, min(values[-1], WORST))
    return Searched(np.array(values), settings)


def search_box(
    method: str,
    center: np.ndarray,
    width: float,
    judge: Callable[[np.ndarray], float],
    trials: int,
    seed: int,
) -> None:
    """Minimise `judge(x)` over vectors at most `width` from the centre, which is the first trial.

    Args:
        method: One of `SEARCHES`. CMA-ES keeps a variance for each number, instead of a matrix,
            where there are `MANY` or more.
        center: Of shape (numbers,).
    """
    if method == "tpe" or center.size < MANY:
        first = {f"x{i}": x for i, x in enumerate(center.tolist())}

        def suggest(trial: Any) -> dict[str, float]:
            return {key: trial.suggest_float(key, x - width, x + width) for key, x in first.items()}

        search(method, suggest, lambda x: judge(np.array([*x.values()])), trials, seed, first)
    elif method == "random":
        draw = np.random.default_rng(seed).uniform
        for i in range(trials):
            judge(draw(center - width, center + width) if i else center)
    else:
        _by_separable_cmaes(center, width, judge, trials, seed)


def _by_separable_cmaes(
    center: np.ndarray,
    width: float,
    judge: Callable[[np.ndarray], float],
    trials: int,
    seed: int,
) -> None:
    """The centre, then generations that begin around it, a sixth of the box wide as in Optuna."""
    bounds = np.stack([center - width, center + width], axis=1)
    sampler = import_module("cmaes").SepCMA(center, 2 * width / 6, bounds=bounds, seed=seed)
    judge(center)
    generation: list[tuple[np.ndarray, float]] = []
    for _ in range(trials - 1):
        x = sampler.ask()
        value = float(judge(x))
        generation.append((x, min(value, WORST) if math.isfinite(value) else WORST))
        if len(generation) == sampler.population_size:
            sampler.tell(generation)
            generation = []


def _sampler(optuna: Any, method: str, seed: int) -> Any:
    samplers = optuna.samplers
    if method == "random":
        return samplers.RandomSampler(seed=seed)
    if method == "tpe":
        return samplers.TPESampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return samplers.CmaEsSampler(
            seed=seed,
            warn_independent_sampling=False,  # what is a choice is drawn at random
        )
