"""Checks of settings: numbers, words, functions."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = [
    "check_callable",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_not_negative",
    "check_number",
    "check_positive",
    "check_rate",
    "check_seed",
    "unless_traced",
]


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """An integer of at least `minimum`, as a Python int.

    >>> check_count("T", 20)
    20
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, got {value!r} ({type(value).__name__})."
        ) from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}.")
    return number


def check_fraction(name: str, value: Any, hint: str = "") -> float:
    """A number in [0, 1], as a Python float (an array would make the settings unhashable).

    >>> check_fraction("gamma", 0.9)
    0.9
    """
    number = _as_float(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {number}.{' ' + hint if hint else ''}")
    return number


def check_number(name: str, value: Any) -> float:
    """A finite number, as a Python float.

    >>> check_number("lr_hyper", np.float32(0.5))
    0.5
    """
    number = _as_float(name, value, "a number")
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """A finite number of at least 0, as a Python float.

    >>> check_not_negative("theta", 0)
    0.0
    """
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}.")
    return number


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0, as a Python float.

    >>> check_positive("sigma", 0.1)
    0.1
    """
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {number}.")
    return number


def _as_float(name: str, value: Any, rule: str) -> float:
    """A number or an array of shape () as a float; `float` alone would also take text."""
    try:
        if np.shape(value) != () or isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {rule}, got {value!r}.") from None


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words.

    >>> check_choice("loop", "scan", ("scan", "unroll", "host"))
    'scan'
    """
    if not isinstance(value, str) or value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}.")
    return value


def unless_traced(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """`check(name, value)`, for a setting that may be traced: a traced value is taken as it is,
    because only the run knows it.

    >>> unless_traced(check_positive, "step_size", 0.1)
    0.1
    """
    return value if isinstance(value, Tracer) else check(name, value)


def check_seed(seed: Any) -> Any:
    """A whole number of at least 0; may be traced, as in a `vmap` over seeds."""
    return unless_traced(lambda name, x: check_count(name, x, minimum=0), "seed", seed)


def check_rate(name: str, rate: Any) -> Any:
    """A rate: one finite number that is not negative; anything else would reshape what it scales.

    The value of an array that is being traced, or still being computed, is not checked: waiting
    for it would keep the host from running ahead of the device.

    >>> check_rate("lr_hyper", 0.1)
    0.1
    """
    if isinstance(rate, (jax.Array, np.ndarray, np.generic)):
        real = any(jnp.issubdtype(rate.dtype, kind) for kind in (jnp.floating, jnp.integer))
    else:
        real = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not real:
        raise TypeError(f"{name} must be a real number, got {rate!r} ({type(rate).__name__}).")
    if shape := getattr(rate, "shape", ()):
        raise ValueError(
            f"{name} must be one number for all hyperparameters, got shape {shape}. For rates that "
            "differ between leaves give outer_optimizer=optax.multi_transform(...)."
        )
    if isinstance(rate, Tracer) or not getattr(rate, "is_ready", lambda: True)():
        return rate
    if not 0 <= float(rate) < np.inf:
        raise ValueError(
            f"{name} must be a finite number of at least 0, got {rate}. Steps go against the "
            "hypergradient; to maximise, negate the validation loss."
        )
    return rate


def check_callable(name: str, value: Any, signature: str) -> Callable:
    """`value` if it is callable; else the message says which function is expected."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function {signature}, got {value!r} ({type(value).__name__})."
        )
    return value
