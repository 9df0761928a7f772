"""What single-loop methods share: schedules, and a given gradient through the inner optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import Hyper, Params
from gradhpo.utils._partition import merge, split
from gradhpo.utils.gradients import tree_l2_norm, tree_scale
from gradhpo.utils.validation import check_positive, unless_traced

__all__ = [
    "Schedule",
    "apply_gradient",
    "check_schedule",
    "guarded",
    "relative_norm",
    "value_at",
]

Schedule = float | Callable[[Any], Any]
"""A number, or a function of the count of outer updates (an Optax schedule)."""


def check_schedule(name: str, value: Any) -> Schedule:
    """A positive number, or a function of the count, whose values only the run knows.

    >>> check_schedule("step_size", 0.1)
    0.1
    """
    return value if callable(value) else unless_traced(check_positive, name, value)


def value_at(schedule: Schedule, count: jax.Array) -> Any:
    """The schedule at update `count`, which is 0 at the first.

    >>> import jax.numpy as jnp
    >>> print(
    ...     value_at(lambda t: 0.1 * (t + 1.0) ** -0.5, jnp.array(3)), value_at(0.5, jnp.array(3))
    ... )
    0.05 0.5
    """
    return schedule(count) if callable(schedule) else schedule


def relative_norm(defect: Params, right: Params) -> jax.Array:
    """`||defect|| / ||right||`, and `||defect||` where the right-hand side is zero."""
    norm = tree_l2_norm(right)
    return tree_l2_norm(defect) / jnp.where(norm == 0, 1, norm)


def guarded(hypergrad: Hyper, residual: jax.Array) -> Hyper:
    """NaN where the new u would not be finite, so that the finite guard undoes both."""
    return tree_scale(jnp.where(jnp.isfinite(residual), 1, jnp.nan), hypergrad)


def apply_gradient(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, gradient: Params, method: str
) -> InnerState:
    """One step of the inner optimizer on a gradient of the method's own making.

    Args:
        gradient: Over the floating leaves of the weights, None elsewhere.
        method: Its name, for the message.

    Raises:
        ValueError: the dynamics have no `parts` (an opaque `update_fn`).
    """
    if problem.dynamics.parts is None:
        raise ValueError(
            f"{method} sends a gradient of its own through the inner optimizer, but these dynamics "
            "come from an opaque update_fn, which takes its gradient itself; give inner_optimizer= "
            "(or dynamics by from_optax), or use soba, amigo or stocbio."
        )
    _, make_optimizer = problem.dynamics.parts
    w, rest = split(inner.params)
    updates, slots = make_optimizer(lam).update(gradient, inner.opt_state, w)
    return inner._replace(params=merge(optax.apply_updates(w, updates), rest), opt_state=slots)
