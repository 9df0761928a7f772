"""Training walked once, forwards, for a walk back along the line from s_0 to s_T."""

from typing import NamedTuple

import jax.numpy as jnp

from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Loop, fold, whole
from gradhpo.core.problem import BilevelProblem, Window, check_window, outer_gradients
from gradhpo.core.types import Hyper, PyTree, Scalar
from gradhpo.utils._partition import scalar_dtype, split
from gradhpo.utils.gradients import tree_last

__all__ = ["Line", "walk"]


class Line(NamedTuple):
    """What a walk back needs."""

    inner: InnerState  # s_T
    ends: tuple[PyTree, PyTree]  # the floating leaves of s_0 and s_T
    val_loss: Scalar  # L_val(w_T, lam; V_T)
    alpha: PyTree  # alpha_T
    direct: Hyper  # dL_val/dlam
    xs: PyTree  # for `fold`, by step: `(beta_t, D_t, kept)`, beta_t = (t - 1) / T. `kept` is what
    # the line does not give of s_{t-1}: `(integer leaves, model state, floating leaves)`, the last
    # None for points="line"


def walk(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    window: Window,
    *,
    points: str = "line",
    loop: Loop = "scan",
) -> Line:
    """Train on a window, and judge its end.

    Args:
        points: "line" or "trajectory", which keeps every state.

    Cost: T training gradients and a validation gradient.
    """
    first, _ = split((inner.params, inner.opt_state))
    forward = _on_the_line if points == "line" else _stored
    inner, kept = fold(forward, problem, lam, inner, window.train, loop=loop)
    last, _ = split((inner.params, inner.opt_state))
    judged = whole(_judge, loop)(problem, inner, lam, window.val)
    T = check_window(window)
    beta = jnp.arange(T, dtype=scalar_dtype(lam)) / T
    return Line(inner, (first, last), *judged, xs=(beta, window.train, kept))


def _on_the_line(problem, lam, inner, batch):
    _, rest = split((inner.params, inner.opt_state))
    return problem.dynamics.step(inner, lam, batch), (rest, inner.model_state, None)


def _stored(problem, lam, inner, batch):
    floating, rest = split((inner.params, inner.opt_state))
    return problem.dynamics.step(inner, lam, batch), (rest, inner.model_state, floating)


def _judge(problem, inner, lam, val):
    return outer_gradients(problem, inner, lam, tree_last(val))
