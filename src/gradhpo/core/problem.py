"""The bilevel problem: inner dynamics, outer loss, and the windows of data they see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.core import losses
from gradhpo.core.dynamics import Dynamics, InnerState, zero_cotangent
from gradhpo.core.types import Batch, Hyper, LossFn, MetricDict, Params, PyTree, Scalar
from gradhpo.utils._partition import merge, split
from gradhpo.utils.validation import leaves_with_names

__all__ = [
    "Begin",
    "BilevelProblem",
    "Start",
    "Window",
    "check_problem_type",
    "check_window",
    "judge",
    "outer_gradients",
]


class Window(NamedTuple):
    """Data of several inner steps: every leaf has the step as leading axis."""

    train: Batch
    val: Batch


class Start(NamedTuple):
    """Where an episode begins, returned by `begin(params, hyperparams, draw)`.

    Attributes:
        params: w_0; its dependence on the hyperparameters is differentiated.
        window: The T batches of the episode, where they come with the start (a task's own
            data); not differentiated. None: they come from the sources of the run.
        model_state: `()` goes on with the one that training has brought along.
    """

    params: Params
    window: Window | None = None
    model_state: PyTree = ()


Begin = Callable[[Params, Hyper, Any], Start]


class BilevelProblem(NamedTuple):
    """What is trained, what training is judged by, and where it begins."""

    dynamics: Dynamics
    outer_loss: LossFn  # L_val(w, lam; V), see `gradhpo.core.losses`
    train_loss: LossFn | None = None  # L_train(w, lam; D)
    # `train_loss` is reported, and differentiated by the implicit and single-loop methods, whose
    # hypergradient is that of its minimum; the others take derivatives of `dynamics` alone. None:
    # it is that of `dynamics.parts` (`from_optax`); without parts it is not reported, and those
    # methods refuse the problem.
    begin: Begin | None = None  # None: an episode begins where the last one ended

    @property
    def reported_loss(self) -> LossFn | None:
        """The training loss to report, if one is known."""
        parts = self.dynamics.parts
        return self.train_loss or (None if parts is None else parts.train_loss)


def check_problem_type(who: str, problem: Any) -> None:
    """A bilevel problem.

    Raises:
        TypeError: something else.
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"{who} takes a gradhpo.BilevelProblem(dynamics, outer_loss), got "
            f"{type(problem).__name__}."
        )


def check_window(window: Window, steps: int | None = None) -> int:
    """The number of inner steps that a window holds: the leading length of every leaf.

    Args:
        steps: How many it must hold; None: any number, the same for all leaves.

    Raises:
        ValueError: a leaf of another length, or without the axis; the message names it.

    >>> check_window(Window(np.ones((3, 64, 5)), np.ones((3, 8))))
    3
    """
    leaves = leaves_with_names(window)
    if steps is None:
        seen = ((np.shape(leaf)[0], name) for name, leaf in leaves if np.ndim(leaf))
        length, first = next(seen, (0, ""))
        wanted = f"of one length, {length} in window{first}"
    else:
        length, wanted = steps, f"of length {steps}: this estimator takes {steps} at a time"
    for name, leaf in leaves:
        if np.shape(leaf)[:1] != (length,):
            raise ValueError(
                f"every leaf of a window needs the step as its leading axis, {wanted}; but window"
                f"{name} has the shape {np.shape(leaf)}. Stack the batches of the steps, "
                "jnp.stack([...]); a single batch x becomes a window of one step as x[None]."
            )
    return length


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
    loss, alpha, direct, _ = judge(problem, inner, lam, batch)
    return loss, alpha, direct


def judge(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch
) -> tuple[Scalar, InnerState, Hyper, MetricDict]:
    """`outer_gradients`, with what the validation loss says under the names of the metrics."""
    floating, rest = split(inner.params)

    def loss(floating, lam):
        weights = merge(floating, rest)
        return losses.judge(problem.outer_loss, weights, lam, batch, inner.model_state)

    derivatives = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, metrics), (alpha, direct) = derivatives(floating, lam)
    alpha = zero_cotangent(inner)._replace(params=alpha)
    return value, alpha, direct, losses.reported("val", value, metrics)
