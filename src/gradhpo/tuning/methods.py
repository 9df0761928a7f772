"""A registered method by its name and its settings, for a task, which has its own training step."""

from dataclasses import fields
from typing import Any, NamedTuple

import optax

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.registry import METHODS
from gradhpo.driver.caches import cached
from gradhpo.tuning.searches import SEARCHES
from gradhpo.tuning.target import setting
from gradhpo.tuning.training import Method
from gradhpo.utils.settings import check_positive

__all__ = ["KNOWN", "Chosen", "chosen", "method_of"]

KNOWN = (*METHODS, *SEARCHES)
OF_RUNS = ("update_every", "update_last")  # settings of all methods that a task leaves open


class Chosen(NamedTuple):
    """A method as a command names it."""

    word: str
    name: str
    settings: dict[str, Any]  # of its class
    outer_rate: float | None  # its own; None: that of all methods


def chosen(word: str) -> Chosen:
    """The method of a word NAME or NAME:SETTING=VALUE,...; `outer_rate` is one for all methods.

    Raises:
        ValueError: there is no such method, or a search is given settings.

    >>> chosen("hyperdistill:gamma=0.9,outer_rate=0.1")[1:]
    ('hyperdistill', {'gamma': 0.9}, 0.1)
    """
    name, _, rest = word.partition(":")
    if name not in KNOWN:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(KNOWN)}.")
    settings = dict(map(setting, filter(None, rest.split(","))))
    rate = settings.pop("outer_rate", None)
    if rate is not None:
        rate = check_positive("outer_rate", rate)
    if name in SEARCHES and (settings or rate):
        raise ValueError(f"{name}, a search, has no settings: write {name} alone.")
    return Chosen(word, name, settings, rate)


def method_of(method: Chosen, steps: int) -> Method:
    """The method, in windows that fit an episode of T steps.

    One object for equal arguments, so that its programs are found again.

    Args:
        steps: T.

    Raises:
        ValueError: it has no such setting, or needs one that fits the problem.
    """
    name, settings, entry = method.name, dict(method.settings), METHODS[method.name]
    of_all = {field.name for field in fields(EstimatorOptimizer)}
    known = {field.name for field in fields(entry.optimizer)} - of_all | set(OF_RUNS)
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"{unknown[0]}={settings[unknown[0]]!r}: the method {name} has the settings "
            f"{', '.join(sorted(known))}, outer_rate."
        )
    if missing := [setting for setting in entry.needs if setting not in settings]:
        needed = ",".join(f"{setting}=..." for setting in missing)
        raise ValueError(f"the method {name} needs {name}:{needed}, which has to fit the task.")
    return _one_object(entry.over(steps, inner_optimizer=STEP, **settings))


@cached
def _one_object(optimizer: EstimatorOptimizer) -> Method:
    """Bound methods are equal only if they are of one object."""
    return optimizer.method


STEP = optax.identity()  # stands for the training step of the task, which the method is given
