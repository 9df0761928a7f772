"""What a problem's program reveals before it runs: ignored hyperparameters, convolutions.

Everything here traces and looks at the jaxpr; nothing is computed.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from gradhpo.core.dynamics import InnerState
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.types import Batch, Hyper, Params, PyTree
from gradhpo.utils._jaxpr import equations
from gradhpo.utils._partition import is_differentiable, merge, split
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import check_same_avals, check_scalar_loss, leaves_with_names

__all__ = [
    "check_problem",
    "has_convolution",
    "ignored_hyperparams",
    "unreached_hyperparams",
    "untrained_params",
]


def check_problem(problem: BilevelProblem, inner: InnerState, lam: Hyper, window: Window) -> None:
    """Structure of a problem at its first call: scalar losses, a state that can be scanned.

    Raises:
        TypeError: a loss is not one floating-point scalar.
        ValueError: Phi changes the structure, shape or dtype of the state, or needs a value
            of the loss that only a line search has.
    """
    train, val = jax.eval_shape(tree_last, window)
    if problem.train_loss is not None:
        check_scalar_loss("train_loss_fn", problem.train_loss, inner.params, lam, train)
    check_scalar_loss("val_loss_fn", problem.outer_loss, inner.params, lam, val)
    try:
        after = jax.eval_shape(problem.dynamics.step, inner, lam, train)
    except TypeError as error:
        if "required keyword-only argument" in str(error):
            raise ValueError(
                "the inner optimizer asks for the value or the gradient of the loss "
                f"({error}): line-search and Polyak optimizers (lbfgs, polyak_sgd) have no "
                "pullback through one update. Take a first-order optimizer (sgd, adam, …)."
            ) from error
        raise
    before = jax.eval_shape(lambda: inner)
    check_same_avals(before, after)


def ignored_hyperparams(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Window, indirect: bool
) -> list[str]:
    """Names of the leaves of `lam` whose hypergradient is structurally zero.

    Args:
        problem, inner, lam: As everywhere; `lam` may be abstract.
        batch: One train and one validation batch, without a window axis.
        indirect: Whether the method sees the path through training (False: first-order).
    """

    def outputs(lam, inner, batch):
        direct = problem.outer_loss(inner.params, lam, batch.val)
        if not indirect:
            return direct
        new = problem.dynamics.step(inner, lam, batch.train)
        return direct, split((new.params, new.opt_state))[0]

    return _without_tangent(outputs, lam, inner, batch)


def unreached_hyperparams(
    problem: BilevelProblem,
    condition: Callable[[Params, Hyper, Batch], PyTree],
    inner: InnerState,
    lam: Hyper,
    batch: Window,
) -> list[str]:
    """Names of the leaves of `lam` that enter neither `condition` nor the outer loss.

    Where `condition(w, lam, batch) = 0` says what training ends at, nothing depends on
    them: learning rates, momenta, schedules.
    """

    def outputs(lam, inner, batch):
        direct = problem.outer_loss(inner.params, lam, batch.val)
        return direct, condition(inner.params, lam, batch.train)

    return _without_tangent(outputs, lam, inner, batch)


def untrained_params(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch
) -> list[str]:
    """Names of the floating leaves of the parameters that the training loss has no path to."""
    loss = problem.train_loss
    if loss is None or problem.dynamics.parts is None:
        return []  # what an update_fn trains on, this loss does not say
    floating, rest = split(inner.params)

    def outputs(floating, rest, lam, batch):
        return loss(merge(floating, rest), lam, batch)

    return _without_tangent(outputs, floating, rest, lam, batch)


def _without_tangent(function: Callable, x: Any, *rest: Any) -> list[str]:
    """Leaves of `x` whose tangent reaches no floating output of `function(x, *rest)`."""

    def tangent(dx, x, rest):
        out = jax.jvp(lambda x: function(x, *rest), (x,), (dx,))
        return [d for y, d in zip(*map(jax.tree.leaves, out), strict=True) if is_differentiable(y)]

    try:
        jaxpr = jax.make_jaxpr(tangent)(x, x, rest).jaxpr
    except TypeError as error:
        if "custom_vjp" in str(error):  # no forward mode, nothing can be said
            return []
        raise
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    names = [name for name, _ in leaves_with_names(x)]
    return [name for name, is_used in zip(names, used, strict=False) if not is_used]


def has_convolution(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch) -> bool:
    """Whether one training step convolves: slow in a compiled loop on CPU (jax issue 12868)."""
    closed = jax.make_jaxpr(problem.dynamics.step)(inner, lam, batch)
    return any(e.primitive.name == "conv_general_dilated" for e in equations(closed.jaxpr))
