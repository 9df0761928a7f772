"""A registered method by its name and its settings, for a task, which has its own training step."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import optax

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.registry import METHODS
from gradhpo.tuning.searches import SEARCHES
from gradhpo.tuning.training import Method

__all__ = ["KNOWN", "check_names", "method_of"]

KNOWN = (*METHODS, *SEARCHES)
OF_RUNS = ("update_every", "update_last")  # settings of all methods that a task leaves open


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names of no method.

    >>> check_names(("reverse", "tpe"))
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(
            f"unknown method {', '.join(map(repr, unknown))}; known: {', '.join(KNOWN)}."
        )


def method_of(name: str, steps: int, settings: Mapping[str, Any] | None = None) -> Method:
    """The method, in windows that fit an episode of so many steps; one for equal arguments.

    Args:
        steps: T.
        settings: Arguments of its class.

    Raises:
        ValueError: it has no such setting, or needs one that fits the problem.
    """
    settings, entry = dict(settings or {}), METHODS[name]
    of_all = {field.name for field in fields(EstimatorOptimizer)}
    known = {field.name for field in fields(entry.optimizer)} - of_all | set(OF_RUNS)
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"{unknown[0]}=...: the method {name} has the settings {', '.join(sorted(known))}."
        )
    if missing := [setting for setting in entry.needs if setting not in settings]:
        needed = " ".join(f"{setting}=..." for setting in missing)
        raise ValueError(f"the method {name} needs {needed}, which has to fit the task.")
    settings["inner_optimizer"] = STEP
    return entry.over(steps, **settings).method


STEP = optax.identity()  # stands for the training step of the task, which the method is given
