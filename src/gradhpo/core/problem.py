"""The bilevel problem: inner dynamics, outer loss, and the windows of data they see."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gradhpo.core.dynamics import Dynamics, InnerState, zero_cotangent
from gradhpo.core.types import Batch, Hyper, LossFn, Params, Scalar
from gradhpo.utils._partition import merge, split

__all__ = ["BilevelProblem", "Window", "outer_gradients"]


class BilevelProblem(NamedTuple):
    """What is trained, and what training is judged by."""

    dynamics: Dynamics
    outer_loss: Callable[[Params, Hyper, Batch], Scalar]  # L_val(w, lam; V)
    train_loss: LossFn | None = None  # only reported, never differentiated; None: not reported


class Window(NamedTuple):
    """Data of several inner steps: every leaf has the step as leading axis."""

    train: Batch
    val: Batch


def outer_gradients(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch
) -> tuple[Scalar, InnerState, Hyper]:
    """`(L_val, alpha, direct)` at one state, by one reverse sweep.

    `alpha = dL_val/ds` is a cotangent on the state, zero on every optimizer slot, and
    `direct = dL_val/dlam` holds the weights fixed.

    >>> import jax.numpy as jnp
    >>> problem = BilevelProblem(None, lambda w, lam, batch: (w - batch) ** 2 + lam * w)
    >>> loss, alpha, direct = outer_gradients(problem, InnerState(jnp.array(2.0), ()), 1.0, 5.0)
    >>> print(loss, alpha.params, direct)
    11.0 -5.0 2.0
    """
    floating, rest = split(inner.params)

    def loss(floating, lam):
        return problem.outer_loss(merge(floating, rest), lam, batch)

    value, (alpha, direct) = jax.value_and_grad(loss, argnums=(0, 1))(floating, lam)
    return value, zero_cotangent(inner)._replace(params=alpha), direct
