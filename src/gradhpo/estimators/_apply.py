"""What single-loop methods share: a given gradient through the inner optimizer, and guards."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradhpo.core.dynamics import InnerState
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.status import Status
from gradhpo.core.types import Hyper, Params
from gradhpo.solvers.neumann import DIVERGED
from gradhpo.utils._partition import merge, split
from gradhpo.utils.gradients import tree_is_finite, tree_l2_norm, tree_scale

__all__ = ["apply_gradient", "guarded", "left", "relative_norm"]


def relative_norm(defect: Params, right: Params) -> jax.Array:
    """`||defect|| / ||right||`, and `||defect||` where the right-hand side is zero."""
    norm = tree_l2_norm(right)
    return tree_l2_norm(defect) / jnp.where(norm == 0, 1, norm)


def left(residual: jax.Array, before: Params, after: Params) -> jax.Array:
    """The status of a system that is followed, not solved: batches leave it a residual.

    Ten times the right-hand side, of which u = 0 leaves one, and a u that grows all the same, says
    that it runs away: by a rate that is too large, or a Hessian that is not positive definite. A u
    that shrinks follows a right-hand side that vanishes.

    Args:
        before, after: u, and the u of the next update.
    """
    grows = tree_l2_norm(after) > tree_l2_norm(before)
    runs_away = (residual >= DIVERGED) & grows
    return jnp.where(runs_away, Status.LINEAR_SOLVE_INACCURATE, Status.OK).astype(jnp.int32)


def guarded(hypergrad: Hyper, carried: Params) -> Hyper:
    """NaN where what the method carries on (u, y) would not be finite, also where the hypergradient
    does not depend on it, so that the finite guard undoes both."""
    return tree_scale(jnp.where(tree_is_finite(carried), 1, jnp.nan), hypergrad)


def apply_gradient(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    gradient: Params,
    method: str,
    scale: ArrayLike = 1.0,
) -> InnerState:
    """One step of the inner optimizer on a gradient of the method's own making.

    Args:
        gradient: Over the floating leaves of the weights, None elsewhere.
        method: Its name, for the message.
        scale: Of the step: what the optimizer makes of the gradient is multiplied by it.

    Raises:
        ValueError: the dynamics have no `parts` (an opaque `update_fn`).
    """
    if problem.dynamics.parts is None:
        raise ValueError(
            f"{method} sends a gradient of its own through the inner optimizer, but these dynamics "
            "come from an opaque update_fn, which takes its gradient itself; give inner_optimizer= "
            "(or dynamics by from_optax), or use soba, amigo or stocbio."
        )
    make_optimizer = problem.dynamics.parts.make_optimizer
    w, rest = split(inner.params)
    updates, slots = make_optimizer(lam).update(gradient, inner.opt_state, w)
    w = optax.apply_updates(w, tree_scale(scale, updates))
    return inner._replace(params=merge(w, rest), opt_state=slots)
