"""Learning-rate schedules in which every number may be a hyperparameter.

    def inner_optimizer(lam):
        return optax.adamw(warmup_cosine(jnp.exp(lam["log_peak"]), lam["warmup"], steps=1000))

Optax's own take peaks and end values from a traced program, but compare and divide the numbers of
steps in Python, which a traced number refuses. These have the same values and a derivative with
respect to every argument, for they are continuous in the numbers of steps, which need not be whole.
The place of a jump has no derivative: pieces of constant rates can be tuned in their heights alone,
for which `optax.piecewise_constant_schedule` will do.

The count that Optax hands to a schedule begins anew with every episode of a run, as all slots do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["piecewise", "warmup_cosine", "warmup_linear"]

Schedule = Callable[[ArrayLike], jax.Array]
"""From the number of the step, which begins at 0, to a rate."""


def warmup_cosine(
    peak: ArrayLike,
    warmup: ArrayLike,
    steps: ArrayLike,
    *,
    start: ArrayLike = 0.0,
    end: ArrayLike = 0.0,
) -> Schedule:
    """A straight line from `start` to `peak`, then half a cosine to `end`, where it stays.

    Args:
        peak: The rate after the warm-up.
        warmup: Steps of the straight line, at most `steps`; at 0 or below there is none.
        steps: The step at which `end` is reached, those of the warm-up included.
        start: The rate at step 0.
        end: The rate from `steps` on.

    As `optax.warmup_cosine_decay_schedule`, whose numbers of steps cannot be tuned.

    >>> schedule = warmup_cosine(1.0, 10.0, 30.0)
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 20, 30, 40)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    return _after_warmup(lambda x: (1 + jnp.cos(jnp.pi * x)) / 2, peak, warmup, steps, start, end)


def warmup_linear(
    peak: ArrayLike,
    warmup: ArrayLike,
    steps: ArrayLike,
    *,
    start: ArrayLike = 0.0,
    end: ArrayLike = 0.0,
) -> Schedule:
    """A straight line from `start` to `peak`, then another to `end`; see `warmup_cosine`.

    >>> schedule = warmup_linear(1.0, 10.0, 30.0)
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 20, 30, 40)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    return _after_warmup(lambda x: 1 - x, peak, warmup, steps, start, end)


def piecewise(values: ArrayLike, at: ArrayLike) -> Schedule:
    """Straight lines through the points `(at, values)`, level before the first and after the last.

    Args:
        values: Rates, shape (n,).
        at: The steps where they are reached, shape (n,), in ascending order; may be tuned as well.

    Raises:
        ValueError: the shapes differ, or there is no point.

    >>> schedule = piecewise([0.1, 1.0, 0.0], at=[0, 10, 30])
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 20, 40)]
    [0.1, 0.55, 0.5, 0.0]
    """
    values, at = jnp.asarray(values), jnp.asarray(at)  # of lists that hold traced numbers as well
    if values.shape != at.shape or values.ndim != 1 or not values.size:
        raise ValueError(
            "piecewise(values, at) takes as many rates as steps, in vectors of one length, got "
            f"shapes {values.shape} and {at.shape}."
        )
    dtype = _dtype(values, at)
    wide = jnp.promote_types(dtype, jnp.float32)
    at, rates = at.astype(wide), values.astype(wide)
    return lambda count: jnp.interp(jnp.asarray(count, wide), at, rates).astype(dtype)


def _after_warmup(
    falling: Callable[[jax.Array], jax.Array],
    peak: ArrayLike,
    warmup: ArrayLike,
    steps: ArrayLike,
    start: ArrayLike,
    end: ArrayLike,
) -> Schedule:
    """`falling` takes [0, 1], the part of the way after the warm-up, to [1, 0]."""
    given = {"peak": peak, "warmup": warmup, "steps": steps, "start": start, "end": end}
    for name, value in given.items():
        if jnp.ndim(value):
            raise ValueError(
                f"{name} of a schedule is one number, got shape {jnp.shape(value)}. For a rate of "
                "each layer scale the updates after it, gradhpo.transforms.scale_by_tree."
            )
    dtype = _dtype(*given.values())
    wide = jnp.promote_types(dtype, jnp.float32)  # half precision cannot count to 3000
    peak, warmup, steps, start, end = (jnp.asarray(value, wide) for value in given.values())
    warmup = jnp.clip(warmup, 0, steps)
    left = steps - warmup

    def schedule(count):
        t = jnp.asarray(count, wide)
        rises = t < warmup
        # Where the other branch is taken a quotient must stay finite, or its derivative is NaN.
        up = t / jnp.where(rises, warmup, 1)
        down = jnp.clip((t - warmup) / jnp.where(left > 0, left, 1), 0, 1)
        down = jnp.where(left > 0, down, 1)
        rate = jnp.where(rises, start + (peak - start) * up, end + (peak - end) * falling(down))
        return rate.astype(dtype)

    return schedule


def _dtype(*values: Any) -> Any:
    """Of the rates: floating point also where all numbers are whole."""
    return jnp.result_type(*values, 1.0)
