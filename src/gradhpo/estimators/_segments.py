"""Segments of a window: which steps they hold, and how long they should be for a given memory."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gradhpo.core.estimator import count_steps
from gradhpo.core.types import Batch

__all__ = ["Span", "cut", "levels_for", "segments"]


class Span(NamedTuple):
    """Consecutive steps of a window."""

    start: int | Array  # may be traced
    steps: int


def cut(batches: Batch, span: Span) -> Batch:
    """The batches of a span; the whole window is not copied."""
    if count_steps(batches) == span.steps:
        return batches
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, span.start, span.steps), batches)


def segments(span: Span, size: int) -> tuple[Span, Array]:
    """A span as a head, of the steps left over, and the starts of segments of `size` steps.

    >>> head, starts = segments(Span(0, 10), 4)
    >>> print(head, starts)
    Span(start=0, steps=2) [2 6]
    """
    rest = span.steps % size
    return Span(span.start, rest), span.start + jnp.arange(rest, span.steps, size)


def levels_for(steps: int, state: int, kept: int, budget: int | None = None) -> tuple[int, ...]:
    """Lengths of the segments, longest first, for the fewest levels that fit.

    Args:
        steps: Steps T to reverse.
        state: Bytes of one state, which a segment's start stores.
        kept: Bytes stored per step of the innermost segment.
        budget: Bytes for all of them; None asks for one level.

    With d levels about `(d + 1) T^(1 / (d + 1))` states are alive and every step is run d
    times more.

    >>> levels_for(100, state=8, kept=8), levels_for(1000, 8, 8, budget=300)
    ((10,), (100, 10))

    Raises:
        ValueError: even the smallest plan needs more than the budget; the message says how much.
    """
    if steps < 2:
        return ()
    plans = []
    for depth in range(0 if budget else 1, steps.bit_length()):
        # d levels of r segments and an innermost one of r state / kept steps, in balance.
        parts = max((steps * kept / state) ** (1 / (depth + 1)), 1.5)
        ends = [steps, *(round(steps / parts**level) for level in range(1, depth + 1))]
        lengths = tuple(max(length, 1) for length in ends[1:])
        starts = sum(math.ceil(a / max(b, 1)) for a, b in itertools.pairwise(ends))
        plans.append((starts * state + max(ends[-1], 1) * kept, lengths))
        if budget is None or plans[-1][0] <= budget:
            return lengths
    raise ValueError(
        f"reversing {steps} steps takes at least {min(plans)[0]} bytes of stored states "
        f"({state} each), more than the budget of {budget}. Raise it, or truncate."
    )
