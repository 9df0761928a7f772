"""What a backward sweep stores of the states s_t, and how it makes s_{t-1} from it again.

A state is stored whole, unless the slots of the inner optimizer tell its last update
(`gradhpo.transforms`): then w_{t-1} = w_t - U_t, and the weights are not stored.
"""

from typing import Any

import jax
import optax

from gradhpo.core.dynamics import InnerState, join
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import Hyper
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_bytes

__all__ = ["bytes_of", "carried", "keep", "recall"]


def _retraceable(problem: BilevelProblem, lam: Hyper) -> Any:
    """The inner optimizer, if its slots tell the last update; else None."""
    parts = problem.dynamics.parts
    optimizer = None if parts is None else parts.make_optimizer(lam)
    return optimizer if hasattr(optimizer, "last_updates") else None


def keep(problem: BilevelProblem, lam: Hyper, inner: InnerState) -> InnerState:
    """What is stored of s_{t-1}: all of it, or all but the weights."""
    if _retraceable(problem, lam) is None:
        return inner
    return inner._replace(params=split(inner.params)[1])


def carried(problem: BilevelProblem, lam: Hyper, inner: InnerState) -> InnerState | None:
    """What the sweep carries of s_t: all of it if s_{t-1} is made from it, else nothing."""
    return None if _retraceable(problem, lam) is None else inner


def recall(
    problem: BilevelProblem, lam: Hyper, after: Any, kept: InnerState
) -> tuple[InnerState, Any]:
    """s_{t-1} from what was carried and kept; and the gradient there, or None if unknown."""
    optimizer = _retraceable(problem, lam)
    if optimizer is None:
        return kept, None
    weights = optax.tree.sub(split(after.params)[0], optimizer.last_updates(after.opt_state))
    slots, rest = split(kept.opt_state)
    inner = join((weights, slots), (kept.params, rest), kept.model_state)
    told = getattr(optimizer, "last_gradients", None)
    return inner, None if told is None else told(kept.opt_state, after.opt_state)


def bytes_of(problem: BilevelProblem, inner: InnerState, lam: Hyper) -> tuple[int, int]:
    """Bytes of a state, and of what `keep` leaves of it."""
    kept = jax.eval_shape(lambda lam, inner: keep(problem, lam, inner), lam, inner)
    return tree_bytes(inner), max(tree_bytes(kept), 1)
