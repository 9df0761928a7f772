"""Which methods a check runs: names of the registry, or estimators of the user's own."""

from collections.abc import Mapping
from typing import Any

from gradhpo.algorithms.registry import METHODS
from gradhpo.core.estimator import Estimator

__all__ = ["choose", "known_methods"]


def known_methods() -> tuple[str, ...]:
    """What `check_hypergradient` knows by name: the entries of `METHODS` at the time of the call,
    without those whose settings have to fit the problem (`saba`, `fds`), which are given as
    estimators.

    >>> known_methods()[:2]
    ('fo', 'one_step')
    """
    return tuple(name for name, method in METHODS.items() if not method.needs)


def choose(methods: Any) -> dict[str, Estimator | str]:
    """What is run, by the name of its row.

    Raises:
        ValueError: `methods` is one method, not several, or has an unknown name.
    """
    if methods is None:
        return {name: name for name, method in METHODS.items() if method.usual}
    if isinstance(methods, str | Estimator):
        raise ValueError(
            "methods must be several: a list of names, or a mapping from names to estimators, "
            f"got {type(methods).__name__}."
        )
    chosen = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
    known = known_methods()
    for choice in chosen.values():
        if isinstance(choice, Estimator) or choice in known:
            continue
        raise ValueError(
            f"unknown method {choice!r}; known: {', '.join(known)}. Anything else is given as an "
            "estimator, in a mapping: {'mine': my_estimator()}."
        )
    return chosen
