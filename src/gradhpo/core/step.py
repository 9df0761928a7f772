"""One outer update: the estimate applied, guarded and measured.

    h, s, memory <- estimate(memory, s, lam, window)
    lam <- outer(lam, h)

A pure function of the state: jit it, vmap it over seeds or tasks, scan it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core import losses
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Estimate, Estimator, check_estimator
from gradhpo.core.inspect import check_problem
from gradhpo.core.losses import has_model_state
from gradhpo.core.outer import (
    Outer,
    Rated,
    as_outer,
    check_outer,
    check_outer_step,
    checked_apply,
)
from gradhpo.core.problem import BilevelProblem, Window, check_problem_type
from gradhpo.core.start import Origin
from gradhpo.core.state import BilevelState, empty_metadata
from gradhpo.core.status import Status
from gradhpo.core.types import Hyper, MetricDict, Params, PyTree
from gradhpo.utils._calls import explain_loops
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import tree_is_finite, tree_l2_norm, tree_last, tree_where
from gradhpo.utils.validation import check_start, explain_leaves

__all__ = [
    "OuterOptimizer",
    "apply_estimate",
    "bilevel_step",
    "copies",
    "init_state",
    "measured",
    "one_task",
    "outer_metrics",
    "per_task",
    "strengthen",
    "verdict",
    "with_metrics",
]

OuterOptimizer = optax.GradientTransformation | Outer | Rated | None
StepFn = Callable[..., BilevelState]


def init_state(
    problem: BilevelProblem,
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    params: Params,
    hyperparams: Hyper,
    window: Window | None = None,
    *,
    model_state: PyTree = (),
) -> BilevelState:
    """A fresh `BilevelState` for `bilevel_step`, its structure and dtypes final.

    Args:
        window: Shows estimators that keep data the shape of a batch, and which metrics the losses
            return: without it only their values are reported. Only shapes are read.
        model_state: Of losses that have one, see `gradhpo.core.losses`.

    With `over_tasks` every task gets a copy of `params` and `model_state`.

    Raises:
        TypeError, ValueError: an argument is something else, or a leaf has a type or a value that
            nothing can start from; the message names it.
    """
    check_problem_type("init_state", problem)
    check_estimator("init_state", estimator)
    if outer_optimizer is not None:
        check_outer("outer_optimizer", outer_optimizer)
    check_start(params, hyperparams, model_state)
    params, hyperparams, model_state = strengthen((params, hyperparams, model_state))
    if estimator.tasks is not None:
        params, model_state = copies((params, model_state), estimator.tasks)

    def init(params, model_state):
        made = problem.dynamics.init(params, hyperparams)
        stateful = has_model_state(made.model_state)
        return made if stateful else made._replace(model_state=model_state)

    inner = strengthen(per_task(estimator, init)(params, model_state))
    outer = as_outer(outer_optimizer)
    state = BilevelState.create(
        params,
        hyperparams,
        inner.opt_state,
        strengthen(outer.init(hyperparams)),
        metadata=empty_metadata(hyperparams, estimator.metrics + outer_metrics(outer_optimizer)),
        memory=strengthen(estimator.init(inner, hyperparams, window)),
        model_state=inner.model_state,
    )
    if window is None or problem.outer_loss is None:
        return state
    return with_metrics(state, check_problem(problem, *one_task(estimator, state, window)))


def one_task(
    estimator: Estimator, state: BilevelState, window: Window
) -> tuple[InnerState, Hyper, Window]:
    """`(inner, lam, window)` of one task, its shapes alone if there are several."""
    inner, lam = state.inner, state.hyperparams
    if estimator.tasks is None:
        return inner, lam, window
    first = partial(jax.tree.map, lambda x: x[0])
    second = partial(jax.tree.map, lambda x: x[:, 0])
    return jax.eval_shape(lambda i, lam, w: (first(i), lam, second(w)), inner, lam, window)


def per_task(estimator: Estimator, function: Callable) -> Callable:
    """`function`, mapped over the leading axis of its arguments if the estimator has tasks."""
    return function if estimator.tasks is None else jax.vmap(function)


def copies(tree: PyTree, n: int) -> PyTree:
    """n copies of every leaf along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), tree)


def outer_metrics(outer_optimizer: OuterOptimizer) -> tuple[str, ...]:
    """The metrics of an outer update."""
    return () if as_outer(outer_optimizer, 1.0).settle is None else ("outer_stationarity",)


def with_metrics(state: BilevelState, names: tuple[str, ...]) -> BilevelState:
    """The state with room for these metrics, unknown so far."""
    missing = [name for name in names if name not in state.metadata]
    if not missing:
        return state
    unknown = np.full((), np.nan, scalar_dtype(state.hyperparams))
    return state.update(metadata=dict.fromkeys(missing, unknown))


def strengthen(tree: PyTree) -> PyTree:
    """Every leaf an array of a strong dtype; one weak leaf (0.1) would compile everything twice."""

    def strong(x):
        x = jnp.asarray(x)
        return lax.convert_element_type(x, x.dtype) if x.aval.weak_type else x

    return jax.tree.map(strong, tree)


def bilevel_step(estimator: Estimator, outer_optimizer: OuterOptimizer = None) -> StepFn:
    """One outer update as a pure function `(problem, state, window, lr_hyper=None) -> state`.

    Args:
        estimator: The hypergradient method.
        outer_optimizer: Moves the hyperparameters: an Optax optimizer or a `gradhpo.Outer`; None
            takes plain steps of `lr_hyper`.

    The finite guard: a step that leaves NaN or infinity in the inner state is undone as a
    whole; a hypergradient or outer update that is not finite leaves the hyperparameters and
    the outer slots alone. `metadata` says so, and `state.counts` keeps it. Nothing is ever raised
    from here.

    The step takes the `origin` of an episode with its first window, see `gradhpo.core.start`.

    >>> from gradhpo import BilevelProblem, Window, from_update, one_step
    >>> dynamics = from_update(lambda w, lam, batch: w - 0.5 * (w - lam))
    >>> problem = BilevelProblem(dynamics, lambda w, lam, batch: (w - 2.0) ** 2)
    >>> step = bilevel_step(one_step(), optax.sgd(0.1))
    >>> state = init_state(problem, one_step(), optax.sgd(0.1), jnp.zeros(()), jnp.ones(()))
    >>> state = jax.jit(step, static_argnums=0)(problem, state, Window(jnp.zeros(1), jnp.zeros(1)))
    >>> print(state.params, state.hyperparams)
    0.5 1.15
    """

    check_estimator("bilevel_step", estimator)
    if outer_optimizer is not None:
        check_outer("outer_optimizer", outer_optimizer)

    def step(
        problem: BilevelProblem,
        state: BilevelState,
        window: Window,
        lr_hyper: Any = None,
        origin: Origin | None = None,
    ) -> BilevelState:
        check_outer_step("bilevel_step", outer_optimizer, lr_hyper)
        if estimator.room is not None and estimator.room.missing(state.memory):
            # A batch's shape is known only now; allocated first, so that it can be undone.
            state = state.update(memory=estimator.room.make(state.memory, window))
        with explain_loops(), explain_leaves(state=state, window=window):
            estimate = estimator.estimate(
                problem, state.memory, state.inner, state.hyperparams, window, origin
            )
        outer = as_outer(outer_optimizer, lr_hyper)
        return apply_estimate(estimator, outer, problem, state, estimate, window)

    return step


def apply_estimate(
    estimator: Estimator,
    outer: Outer,
    problem: BilevelProblem,
    state: BilevelState,
    estimate: Estimate,
    window: Window,
) -> BilevelState:
    """The outer update, the finite guard and the metrics."""
    # One hypergradient for the update, its norm and the check: fused into each it is three.
    estimate = estimate._replace(hypergrad=lax.optimization_barrier(estimate.hypergrad))
    lam = state.hyperparams
    new_lam, slots = checked_apply(outer, estimate.hypergrad, state.outer_opt_state, lam)
    status, trained, remembered, tuned = verdict(
        estimator, estimate, tree_is_finite((new_lam, slots))
    )
    inner = tree_where(trained, InnerState(*estimate.inner), state.inner)
    first_bad, rejected = state.metadata["first_bad_step"], state.metadata["n_rejected"]
    counts = jnp.asarray(state.counts)
    return state.update(
        params=inner.params,
        inner_opt_state=inner.opt_state,
        model_state=inner.model_state,
        hyperparams=tree_where(tuned, new_lam, lam),
        outer_opt_state=tree_where(tuned, slots, state.outer_opt_state),
        step=optax.safe_increment(jnp.asarray(state.step)),
        memory=tree_where(remembered, estimate.memory, state.memory),
        counts=jnp.maximum(counts, counts.at[status].add(1)),  # one that wraps around stays
        metadata={
            **measured(estimator, outer, problem, state, estimate, window),
            "status": status,
            "first_bad_step": jnp.where(~tuned & (first_bad < 0), state.step, first_bad),
            "n_rejected": jnp.where(tuned, rejected, optax.safe_increment(jnp.asarray(rejected))),
        },
    )


class Verdict(NamedTuple):
    """What the finite guard says of an estimate; flags are boolean scalars."""

    status: jax.Array  # int32
    trained: jax.Array  # the new inner state is finite
    remembered: jax.Array  # the new memory is taken
    tuned: jax.Array  # and so are the new hyperparameters


def verdict(estimator: Estimator, estimate: Estimate, stepped: Any = True) -> Verdict:
    """The finite guard, which looks and changes nothing.

    Args:
        stepped: Whether the outer step is finite; True where there is none.
    """
    trained = tree_is_finite(InnerState(*estimate.inner))
    judged = jnp.isfinite(estimate.info["val_loss"])
    derived = tree_is_finite(estimate.hypergrad)  # the norm overflows first
    status = jnp.asarray(estimate.info.get("status", Status.OK), jnp.int32)
    explained = jnp.isin(status, jnp.array([code for code in Status if code.explains]))
    for good, code in (
        (stepped, Status.NONFINITE_HYPERPARAMS),
        (derived, Status.NONFINITE_HYPERGRAD),
        (judged, Status.NONFINITE_VAL_LOSS),
        (trained, Status.NONFINITE_TRAIN_STATE),
    ):  # the earliest cause has the last word
        status = jnp.where(good | explained, status, code)
    # After a bad validation batch the old memory is kept, unless it has to move on with s_t.
    remembered = jnp.where(judged, derived | explained, estimator.follows)
    return Verdict(status, trained, trained & remembered, trained & judged & derived & stepped)


def measured(
    estimator: Estimator,
    outer: Outer,
    problem: BilevelProblem,
    state: BilevelState,
    estimate: Estimate,
    window: Window,
) -> MetricDict:
    """The metrics of an estimate, all of the dtype of those in the state; no status.

    Args:
        outer: Its constraints and penalties are looked at, its rate is not.
    """
    lam, h = state.hyperparams, estimate.hypergrad
    info = {name: value for name, value in estimate.info.items() if name != "status"}
    info |= _reported(problem, estimator, state, estimate, window)
    info["hypergrad_norm"] = tree_l2_norm(h)
    if outer.settle is not None:
        rest = outer.settle(optax.tree.sub(lam, h))
        info["outer_stationarity"] = tree_l2_norm(optax.tree.sub(lam, rest))
    dtype = state.metadata["hypergrad_norm"].dtype
    return {name: jnp.asarray(value, dtype) for name, value in info.items()}


def _reported(
    problem: BilevelProblem,
    estimator: Estimator,
    state: BilevelState,
    estimate: Estimate,
    window: Window,
) -> dict[str, Any]:
    """The training loss and its metrics at the window's first gradient, the metrics of the
    validation loss after its last step; those that the state has room for. What the estimate does
    not tell is evaluated here."""
    lam, loss, parts = state.hyperparams, problem.reported_loss, problem.dynamics.parts
    said = dict(estimate.reported)
    if loss is None:
        said["train_loss"] = jnp.asarray(jnp.nan)
    elif "train_loss" not in said or parts is None or loss is not parts.train_loss:

        def train(params, model_state, batch):
            got = losses.train(loss, params, lam, batch, model_state)
            return losses.reported("train", got.value, got.metrics)

        batch = jax.tree.map(lambda x: x[0], window.train)
        said |= per_task(estimator, train)(state.params, state.model_state, batch)
    asked = (name for name in state.metadata if name.startswith("val_") and name != "val_loss")
    if any(name not in said for name in asked):

        def judge(params, model_state, batch):
            got = losses.judge(problem.outer_loss, params, lam, batch, model_state)
            return losses.reported("val", *got)

        after, batch = estimate.inner, tree_last(window.val)
        said |= per_task(estimator, judge)(after.params, after.model_state, batch)
    return {name: jnp.mean(x) for name, x in said.items() if name in state.metadata}
