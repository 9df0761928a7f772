"""The training loss at one point: its gradient, its Hessian and its mixed derivative.

What implicit and single-loop methods differentiate in place of the path: the condition
`grad_w L_train(w, lam) = 0` that a minimum satisfies.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gradhpo.core.custom_rules import custom_rules
from gradhpo.core.dynamics import InnerState, gradient_and_products
from gradhpo.core.inspect import unreached_hyperparams
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.types import Batch, Hyper, LossFn, Params, PyTree
from gradhpo.utils._partition import merge, split
from gradhpo.utils.validation import complain

__all__ = [
    "Condition",
    "Curvature",
    "check_reached",
    "condition_of",
    "curvature",
    "custom_rules_of",
    "training_loss",
    "warn_of_custom_rules",
]

Condition = Callable[[Params, Hyper, Batch], PyTree]


class Curvature(NamedTuple):
    """`L_train` at `(w, lam)`; trees over the floating leaves of the weights, None elsewhere."""

    gradient: Params  # grad_w L_train
    products: Callable[[Params], tuple[Params, Hyper]]  # q -> (q H, q M)


def curvature(loss: LossFn, inner: InnerState, lam: Hyper, batch: Batch) -> Curvature:
    """Derivatives of a training loss in the weights at one state, its model state held fixed.

    Under `jit` what is not used is not computed: one gradient, and per product one
    Hessian-vector product, which carries `q M` along.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, lam, batch: 0.5 * lam * (w - batch) ** 2
    >>> at = curvature(loss, InnerState(jnp.array(3.0), ()), jnp.array(2.0), 1.0)
    >>> print(at.gradient, *at.products(jnp.array(1.0)))
    4.0 2.0 2.0
    """
    w, rest = split(inner.params)

    def flat(w, lam):
        return loss_value(loss, merge(w, rest), lam, batch, inner.model_state), None

    def products(q):  # linearized here: in a solver's loop nothing is kept from before it
        return gradient_and_products(flat, w, lam)[2](q)

    return Curvature(gradient_and_products(flat, w, lam)[0], products)


def training_loss(problem: BilevelProblem, method: str) -> LossFn:
    """The loss that training minimises.

    Raises:
        ValueError: the problem does not say (an opaque `update_fn` and no `train_loss`).
    """
    if problem.dynamics.parts is not None:
        return problem.dynamics.parts.train_loss
    if problem.train_loss is None:
        raise ValueError(
            f"{method} differentiates the training loss at its minimum, and this problem has none: "
            "give BilevelProblem(..., train_loss=loss), or dynamics by from_optax."
        )
    return problem.train_loss


def condition_of(loss: LossFn, inner: InnerState) -> Condition:
    """`grad_w loss`, over the floating leaves of the weights; zero at a minimum. The model state is
    that of `inner`."""

    def condition(params, lam, batch):
        w, rest = split(params)

        def value(w):
            return loss_value(loss, merge(w, rest), lam, batch, inner.model_state)

        return jax.grad(value)(w)

    return condition


def check_reached(
    problem: BilevelProblem,
    condition: Condition,
    inner: InnerState,
    lam: Hyper,
    batch: Window,
    method: str,
) -> None:
    """Refuse hyperparameters that the end of training does not depend on.

    Args:
        condition: Zero where training ends; `condition_of(loss)`, or a user's own.
        batch: One train and one validation batch, without a window axis.

    Raises:
        ValueError: a leaf enters neither the condition nor the validation loss; the message
            names it.
    """
    names = unreached_hyperparams(problem, condition, inner, lam, batch)
    if names:
        raise ValueError(
            f"{method} cannot tune the leaf {', '.join(names)} of the hyperparameters: it enters "
            "neither the training loss nor the validation loss, and a minimum does not depend on "
            "how it was reached (learning rates, momenta, schedules). Use a method that follows "
            "the path: one_step, hyperdistill or reverse."
        )


def custom_rules_of(loss: LossFn, inner: InnerState, lam: Hyper, batch: Batch) -> list[str]:
    """`custom_rules` of the loss at one state; empty: H is symmetric."""
    w, rest = split(inner.params)

    def value(w, lam):
        return loss_value(loss, merge(w, rest), lam, batch, inner.model_state)

    return custom_rules(value, w, lam)


def warn_of_custom_rules(
    loss: LossFn, inner: InnerState, lam: Hyper, batch: Batch, method: str
) -> None:
    """Warn where a method takes `d/dw dL_train/dlam` for `d/dlam dL_train/dw`, and a custom
    gradient may set the two apart."""
    rules = custom_rules_of(loss, inner, lam, batch)
    if rules:
        complain(
            f"{method} changes the weights and sees how dL_train/dlam moves, which is right for "
            "a loss whose derivatives commute; train_loss has custom gradients "
            f"({', '.join(rules)}). If one is not the derivative of what it stands for (rounding "
            "straight through, gradient reversal, clipping), take a method with exact products: "
            "one_step, reverse.",
            strict=False,
        )
