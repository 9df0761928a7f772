"""A space: where one leaf of the hyperparameters may be.

What is stored moves freely, or is projected back after every update; the losses see its value.

    space               stored                value                        projected
    unconstrained       x                     x
    positive            log(exp(v) - 1)       softplus(x)
    log                 log v                 exp(x)
    interval(a, b)      logit of its place    a + (b - a) sigmoid(x)
      by="projection"   v                     x                            clip(x, a, b)
    probability         logit v               sigmoid(x)
    simplex             log v                 softmax(x)
      by="projection"   v                     x                            nearest, by rows
    integer(a, b)       v                     round(x), straight-through   clip(x, a, b)
    categorical(n)      log v                 softmax(x), or its largest   (settled: the largest)

A map from all numbers (a bijector) never reaches a bound, and is flat near it; a projection does
reach it, and moves by whole steps.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.spaces.projections import simplex_rows
from gradhpo.spaces.relaxations import one_hot, straight_through
from gradhpo.utils.settings import check_choice, check_count, check_number

__all__ = [
    "Space",
    "categorical",
    "integer",
    "interval",
    "log",
    "positive",
    "probability",
    "simplex",
    "unconstrained",
]

Map = Callable[[Any], Any]
SUM = 1e-5  # how far the sum of a simplex may be from 1
BY_PROJECTION = "start inside, or take interval or simplex with by='projection'"


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Maps of one leaf; equal declarations are one object.

    Attributes:
        name: As it was declared.
        refuses: Says what is wrong with a value to start from, or None.
        store: Value to what is stored.
        value: What is stored to its value, differentiable.
        project: What is stored to where it may be; None: anywhere.
        ties: Whether this projection moves a number because of others.
        settle: What is stored to the value that is taken home, discrete; None: its value.
        declaration: The call that declared it; None: it was made by hand.
    """

    name: str
    refuses: Callable[[np.ndarray], str | None]
    store: Map
    value: Map
    project: Map | None = None
    settle: Map | None = None
    ties: bool = False
    declaration: Callable[[], "Space"] | None = dataclasses.field(
        default=None, init=False, repr=False
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is pickled, is declared again: the same object, in one process."""
        if self.declaration is None:
            return super().__reduce_ex__(protocol)
        return self.declaration, ()

    @property
    def natural(self) -> bool:
        """Whether what is stored is in natural scale."""
        return self.store is _same

    def __repr__(self) -> str:
        return self.name


def _same(x: Any) -> Any:
    return x


def _fine(value: np.ndarray) -> None:
    del value


def _declared(make: Callable[..., Space]) -> Callable[..., Space]:
    """Equal arguments give the same object, so that programs are found again."""
    signature = inspect.signature(make)

    @functools.cache
    def cached(*args: Any, **settings: Any) -> Space:
        space = make(*args, **settings)
        again = functools.partial(declare, *args, **settings)
        object.__setattr__(space, "declaration", again)
        return space

    @functools.wraps(make)
    def declare(*args: Any, **settings: Any) -> Space:
        bound = signature.bind(*args, **settings)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if np.ndim(value):
                raise TypeError(f"{name} must be one number for all of a leaf, got {value!r}.")
        return cached(*bound.args, **bound.kwargs)

    return declare


@_declared
def unconstrained() -> Space:
    """Any number."""
    return Space("unconstrained()", _fine, _same, _same)


@_declared
def positive() -> Space:
    """Above 0: softplus. Steps of large values are differences; those of `log` are factors."""
    return Space(
        "positive()",
        _above_zero,
        lambda v: v + jnp.log(-jnp.expm1(-v)),
        jax.nn.softplus,
    )


@_declared
def log() -> Space:
    """Above 0, on a logarithmic scale: steps are factors."""
    return Space("log()", _above_zero, jnp.log, jnp.exp)


@_declared
def interval(low: float, high: float, *, by: str = "bijector") -> Space:
    """Between two numbers.

    Args:
        by: "bijector", a sigmoid, which stays strictly inside, or "projection", which clips.
    """
    low, high = check_number("low", low), check_number("high", high)
    by = check_choice("by", by, ("bijector", "projection"))
    name = f"interval({low:g}, {high:g}{', by=' + repr(by) if by == 'projection' else ''})"
    if not low < high:
        raise ValueError(f"{name} is empty or one number: give low < high.")
    if by == "projection":
        return Space(name, _between(low, high, closed=True), _same, _same, _clip(low, high))
    return Space(
        name,
        _between(low, high, closed=False),
        lambda v: _logit((v - low) / (high - low)),
        lambda x: low + (high - low) * jax.nn.sigmoid(x),
    )


@_declared
def probability() -> Space:
    """Between 0 and 1: sigmoid."""
    return dataclasses.replace(interval(0.0, 1.0), name="probability()")


@_declared
def simplex(*, by: str = "bijector") -> Space:
    """Rows, along the last axis, of numbers that are not negative and sum to 1.

    Args:
        by: "bijector", a softmax, which keeps all above 0, or "projection", which takes most to 0.
    """
    if check_choice("by", by, ("bijector", "projection")) == "projection":
        return Space(
            "simplex(by='projection')",
            _rows(None),
            _same,
            _same,
            simplex_rows,
            ties=True,
        )
    return Space("simplex()", _rows(None, BY_PROJECTION), jnp.log, jax.nn.softmax)


@_declared
def integer(low: int, high: int) -> Space:
    """A whole number from `low` to `high`, both included.

    Stored as a number between them; the losses see it rounded, with the derivative of the number
    itself (straight-through), so they must make sense of a change of one.
    """
    for word, bound in (("low", low), ("high", high)):
        if not isinstance(bound, int | np.integer) or isinstance(bound, bool):
            raise TypeError(f"{word} of an integer space must be a whole number, got {bound!r}.")
    name = f"integer({low}, {high})"
    if not low < high:
        raise ValueError(f"{name} leaves nothing to choose: give low < high.")

    def refuses(start: np.ndarray) -> str | None:
        wrong = _between(low, high, closed=True)(start)
        return wrong or (None if (start == np.round(start)).all() else "is no whole number")

    def rounded(x):
        return straight_through(jnp.round(x), x)

    return Space(name, refuses, _same, rounded, _clip(low, high), jnp.round)


@_declared
def categorical(n: int, *, hard: bool = False) -> Space:
    """One of n, as rows (..., n) of weights along the last axis.

    Args:
        n: Choices, at least two.
        hard: The losses see the choice of the largest weight, with the derivative of the softmax;
            else the weights, a mixture of all. Where the choices shall be drawn, declare a
            `simplex` and use `gumbel_softmax` of its logarithm in the loss.

    Start from equal weights, `np.full(n, 1 / n)`.
    """
    if check_count("n", n) < 2:
        raise ValueError(f"categorical({n}) leaves nothing to choose: give at least 2.")
    name = f"categorical({n}{', hard=True' if hard else ''})"

    def value(x):
        soft = jax.nn.softmax(x)
        return straight_through(one_hot(x), soft) if hard else soft

    equal = "start from equal weights, or near a choice"
    return Space(name, _rows(n, equal), jnp.log, value, settle=one_hot)


def _logit(p: Any) -> Any:
    return jnp.log(p) - jnp.log1p(-p)


def _clip(low: float, high: float) -> Map:
    return lambda x: jnp.clip(x, low, high)


def _above_zero(value: np.ndarray) -> str | None:
    return None if (value > 0).all() else "is not above 0"


def _between(low: float, high: float, *, closed: bool) -> Callable[[np.ndarray], str | None]:
    def refuses(value: np.ndarray) -> str | None:
        if not ((low <= value) & (value <= high)).all():
            return f"is not between {low:g} and {high:g}"
        if not closed and not ((low < value) & (value < high)).all():
            return f"is at a bound, which this map never reaches: {BY_PROJECTION}"
        return None

    return refuses


def _rows(n: int | None, inside: str = "") -> Callable[[np.ndarray], str | None]:
    def refuses(value: np.ndarray) -> str | None:
        if value.ndim == 0 or value.shape[-1] != (n or value.shape[-1]):
            return f"has the shape {value.shape}, not (..., {n or 'n'})"
        if not (value >= 0).all():
            return "has a number below 0"
        if not (np.abs(value.sum(-1) - 1) <= SUM).all():
            return f"has rows that do not sum to 1, but to {value.sum(-1)}"
        if inside and not (value > 0).all():
            return f"has a weight of 0, which this map never leaves: {inside}"
        return None

    return refuses
