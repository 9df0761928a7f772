"""What a problem's program reveals before it runs: ignored hyperparameters, convolutions.

Everything here traces and looks at the jaxpr; nothing is computed.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.types import Batch, Hyper, Params, PyTree
from gradhpo.utils._calls import explain_loops
from gradhpo.utils._jaxpr import equations, needed
from gradhpo.utils._partition import is_differentiable, merge, split
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import check_same_avals, leaves_with_names

__all__ = [
    "Reach",
    "check_problem",
    "has_convolution",
    "reach",
    "started_hyperparams",
    "unreached_hyperparams",
    "untrained_params",
]


def check_problem(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, window: Window
) -> tuple[str, ...]:
    """Structure of a problem at its first call: scalar losses, a state that can be scanned.

    Returns:
        Names of the metrics that the losses return, as they stand in `state.metadata`.

    Raises:
        TypeError: a loss is not one floating-point scalar, or asks for types that are switched off.
        ValueError: Phi changes the structure, shape or dtype of the state, or needs a value
            of the loss that only a line search has.
    """
    batch = jax.eval_shape(tree_last, window)
    names: list[str] = []
    if problem.reported_loss is not None:
        train = partial(losses.train, problem.reported_loss)
        with _refused_float64("train_loss_fn"):
            got = jax.eval_shape(train, inner.params, lam, batch.train, inner.model_state)
        names += [f"train_{name}" for name in got.metrics]
    judge = partial(losses.judge, problem.outer_loss)
    with _refused_float64("val_loss_fn"):
        _, metrics = jax.eval_shape(judge, inner.params, lam, batch.val, inner.model_state)
    names += [f"val_{name}" for name in metrics]
    try:
        with explain_loops(), _refused_float64("the training step"):
            after = jax.eval_shape(problem.dynamics.step, inner, lam, batch.train)
    except TypeError as error:
        if "required keyword-only argument" in str(error):
            raise ValueError(
                "the inner optimizer asks for the value or the gradient of the loss "
                f"({error}): line-search and Polyak optimizers (lbfgs, polyak_sgd) have no "
                "pullback through one update. Take a first-order optimizer (sgd, adam, …)."
            ) from error
        raise
    check_same_avals(
        jax.eval_shape(lambda: inner),
        after,
        rule="Phi must map a state to a state of the same shape and dtype so that it can be "
        "scanned",
        remedy="A common cause is a hyperparameter wider than the parameters; cast it inside "
        "update_fn or the optimizer factory. Another is a learning rate given as a tree shaped "
        "like hyperparams instead of one per leaf.",
    )
    return tuple(names)


@contextlib.contextmanager
def _refused_float64(name: str) -> Iterator[None]:
    """JAX only warns of a request for float64 that it does not meet, and goes on in float32."""
    with warnings.catch_warnings():
        # Last in line: who ignores it has decided so.
        wanted = "Explicitly requested dtype .*float64"
        warnings.filterwarnings("error", wanted, UserWarning, append=True)
        try:
            yield
        except UserWarning as warning:
            if not re.match(wanted, str(warning)):
                raise
            raise TypeError(
                f"{name} asks for float64, but JAX has 64-bit types switched off and would compute "
                "in float32. Ask for float32 or for the dtype of an argument, or switch them on "
                "first: jax.config.update('jax_enable_x64', True)."
            ) from warning


class Reach(NamedTuple):
    """What hyperparameters and weights reach, by the structure of the problem alone."""

    ignored: list[str]  # leaves of lam whose hypergradient is identically zero
    direct: list[str]  # leaves of lam that enter the outer loss itself
    judged: bool  # whether any of the weights do


def reach(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    batch: Window,
    *,
    indirect: bool = True,
    differentiates: bool = True,
) -> Reach:
    """Which parts of `lam` a method can move on this problem.

    Args:
        problem, inner, lam: As everywhere; `lam` may be abstract.
        batch: One train and one validation batch, without a window axis.
        indirect: Whether the method sees the path through training (False: first-order).
        differentiates: Whether it takes derivatives; without, dependence of any kind counts.
    """

    def outputs(moved, inner, batch):
        lam, w = moved
        _, rest = split(inner.params)
        weights = merge(w, rest)
        direct = loss_value(problem.outer_loss, weights, lam, batch.val, inner.model_state)
        if not indirect:
            return (direct,)
        new = problem.dynamics.step(inner, lam, batch.train)
        return direct, split((new.params, new.opt_state))[0]

    moved = (lam, split(inner.params)[0])
    trace = _tangents if differentiates else _values
    names = [name for name, _ in leaves_with_names(lam)]
    if (traced := trace(outputs, moved, inner, batch)) is None:
        return Reach([], names, True)
    _, by_any = needed(traced)
    _, by_loss = needed(traced, [True] + [False] * (len(traced.outvars) - 1))
    return Reach(
        [name for name, used in zip(names, by_any, strict=False) if not used],
        [name for name, used in zip(names, by_loss, strict=False) if used],
        any(by_loss[len(names) : len(jax.tree.leaves(moved))]),
    )


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
        loss, model_state = problem.outer_loss, inner.model_state
        direct = loss_value(loss, inner.params, lam, batch.val, model_state)
        return direct, condition(inner.params, lam, batch.train)

    return _without_tangent(outputs, lam, inner, batch)


def started_hyperparams(
    problem: BilevelProblem, origin: Origin, lam: Hyper, *, differentiates: bool = True
) -> list[str]:
    """Names of the leaves of `lam` that the start of an episode depends on.

    Args:
        differentiates: As in `reach`.

    Raises:
        ValueError: the batches that come with the start depend on some: of those no derivative is
            taken.
    """

    def data(lam, origin):
        return begin_episode(problem, origin, lam)[1]

    def state(lam, origin):
        inner, _ = begin_episode(problem, origin, lam)
        return split((inner.params, inner.opt_state))[0]

    trace = _tangents if differentiates else _values
    names = [name for name, _ in leaves_with_names(lam)]

    def reached(function):
        if (traced := trace(function, lam, origin)) is None:
            return None
        return [name for name, used in zip(names, needed(traced)[1], strict=False) if used]

    if problem.begin is not None and (moved := reached(data)):
        raise ValueError(
            f"the window that begin returns depends on the hyperparameters' leaf {', '.join(moved)}"
            ", of which no derivative would be taken: batches are constants. Let the loss make "
            "what depends on hyperparameters, from the batch and from hyperparams."
        )
    moved = reached(state)
    return names if moved is None else moved


def untrained_params(
    problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch
) -> list[str]:
    """Names of the floating leaves of the parameters that the training loss has no path to."""
    if problem.dynamics.parts is None:
        return []  # what an update_fn trains on, no loss says
    loss = problem.dynamics.parts.train_loss
    floating, rest = split(inner.params)

    def outputs(floating, rest, lam, batch, model_state):
        return loss_value(loss, merge(floating, rest), lam, batch, model_state)

    return _without_tangent(outputs, floating, rest, lam, batch, inner.model_state)


def _without_tangent(function: Callable, x: Any, *rest: Any) -> list[str]:
    """Leaves of `x` whose tangent reaches no floating output of `function(x, *rest)`."""
    traced = _tangents(function, x, *rest)
    if traced is None:
        return []
    names = [name for name, _ in leaves_with_names(x)]
    return [name for name, is_used in zip(names, needed(traced)[1], strict=False) if not is_used]


def _tangents(function: Callable, x: Any, *rest: Any) -> Any:
    """The jaxpr from a tangent on `x` to those of the floating outputs of `function(x, *rest)`;
    its first inputs are the leaves of the tangent. None where there is no forward mode."""

    def tangent(dx, x, rest):
        out = jax.jvp(lambda x: function(x, *rest), (x,), (dx,))
        return [d for y, d in zip(*map(jax.tree.leaves, out), strict=True) if is_differentiable(y)]

    try:
        return jax.make_jaxpr(tangent)(x, x, rest).jaxpr
    except TypeError as error:
        if "custom_vjp" in str(error):  # no forward mode, nothing can be said
            return None
        raise


def _values(function: Callable, x: Any, *rest: Any) -> Any:
    """The jaxpr of `function(x, *rest)`; its first inputs are the leaves of `x`."""
    return jax.make_jaxpr(lambda x, rest: function(x, *rest))(x, rest).jaxpr


def has_convolution(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Batch) -> bool:
    """Whether one training step convolves: slow in a compiled loop on CPU (jax issue 12868)."""
    closed = jax.make_jaxpr(problem.dynamics.step)(inner, lam, batch)
    return any(e.primitive.name == "conv_general_dilated" for e in equations(closed.jaxpr))
