"""Settings that may change as training goes on: numbers, or functions of a count."""

from collections.abc import Callable
from typing import Any

from gradhpo.utils.settings import check_positive, unless_traced

__all__ = ["Rate", "Schedule", "check_schedule", "value_at"]

Rate = Any | Callable[[Any], Any]
"""A number, a tree of them, or a function of the step count that returns either."""

Schedule = float | Callable[[Any], Any]
"""A number, or a function of a count (an Optax schedule)."""


def check_schedule(name: str, value: Any) -> Schedule:
    """A positive number, or a function of the count, whose values are known only during the run.

    >>> check_schedule("step_size", 0.1)
    0.1
    """
    return value if callable(value) else unless_traced(check_positive, name, value)


def value_at(schedule: Any, count: Any) -> Any:
    """The setting at `count`, which starts at 0.

    >>> print(value_at(lambda t: 0.1 * (t + 1.0) ** -0.5, 3), value_at(0.5, 3))
    0.05 0.5
    """
    return schedule(count) if callable(schedule) else schedule
