"""One outer update: the estimate applied, guarded and measured.

    h, s, memory <- estimate(memory, s, lam, window)
    lam <- outer(lam, h)

A pure function of the state: jit it, vmap it over seeds or tasks, scan it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Estimate, Estimator
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.state import BilevelState, empty_metadata
from gradhpo.core.status import Status
from gradhpo.core.types import Hyper, Params, PyTree
from gradhpo.utils._calls import explain_loops
from gradhpo.utils.gradients import tree_is_finite, tree_l2_norm, tree_where
from gradhpo.utils.validation import check_outer_step

__all__ = ["OuterOptimizer", "bilevel_step", "init_state", "strengthen"]

OuterOptimizer = optax.GradientTransformation | None
StepFn = Callable[..., BilevelState]


def init_state(
    problem: BilevelProblem,
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    params: Params,
    hyperparams: Hyper,
    window: Window | None = None,
) -> BilevelState:
    """A fresh `BilevelState` for `bilevel_step`, its structure and dtypes final.

    `window` shows estimators that keep data the shape of a batch; only shapes are read.
    """
    params, hyperparams = strengthen(params), strengthen(hyperparams)
    inner = problem.dynamics.init(params, hyperparams)
    return BilevelState.create(
        params,
        hyperparams,
        strengthen(inner.opt_state),
        () if outer_optimizer is None else strengthen(outer_optimizer.init(hyperparams)),
        metadata=empty_metadata(hyperparams, estimator.metrics),
        memory=strengthen(estimator.init(inner, hyperparams, window)),
        model_state=strengthen(inner.model_state),
    )


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
        outer_optimizer: Moves the hyperparameters; None takes plain steps of `lr_hyper`.

    The finite guard: a step that leaves NaN or infinity in the inner state is undone as a
    whole; a hypergradient or outer update that is not finite leaves the hyperparameters and
    the outer slots alone. `metadata` says so. Nothing is ever raised from here.

    >>> from gradhpo import BilevelProblem, Window, from_update, one_step
    >>> dynamics = from_update(lambda w, lam, batch: w - 0.5 * (w - lam))
    >>> problem = BilevelProblem(dynamics, lambda w, lam, batch: (w - 2.0) ** 2)
    >>> step = bilevel_step(one_step(), optax.sgd(0.1))
    >>> state = init_state(problem, one_step(), optax.sgd(0.1), jnp.zeros(()), jnp.ones(()))
    >>> state = jax.jit(step, static_argnums=0)(problem, state, Window(jnp.zeros(1), jnp.zeros(1)))
    >>> print(state.params, state.hyperparams)
    0.5 1.15
    """

    def step(
        problem: BilevelProblem, state: BilevelState, window: Window, lr_hyper: Any = None
    ) -> BilevelState:
        check_outer_step("bilevel_step", outer_optimizer, lr_hyper)
        if getattr(state.memory, "data", ()) is None:
            # A batch's shape is known only now; allocated first, so that it can be undone.
            fresh = estimator.init(state.inner, state.hyperparams, window)
            state = state.update(memory=state.memory._replace(data=fresh.data))
        with explain_loops():
            estimate = estimator.estimate(
                problem, state.memory, state.inner, state.hyperparams, window
            )
        return _apply(estimator, outer_optimizer, problem, state, estimate, window, lr_hyper)

    return step


def _apply(
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    problem: BilevelProblem,
    state: BilevelState,
    estimate: Estimate,
    window: Window,
    lr_hyper: Any,
) -> BilevelState:
    """The outer update, the finite guard and the metrics."""
    lam, h, info = state.hyperparams, estimate.hypergrad, dict(estimate.info)
    if outer_optimizer is None:
        new_lam = jax.tree.map(lambda x, g: x - jnp.asarray(lr_hyper, x.dtype) * g, lam, h)
        slots = state.outer_opt_state
    else:
        updates, slots = outer_optimizer.update(h, state.outer_opt_state, lam)
        new_lam = optax.apply_updates(lam, updates)

    inner = InnerState(*estimate.inner)
    trained = tree_is_finite(inner)
    judged = jnp.isfinite(info["val_loss"])
    norm = tree_l2_norm(h)
    derived = tree_is_finite(h)  # the norm overflows first
    stepped = tree_is_finite((new_lam, slots))
    status = info.pop("status", jnp.zeros((), jnp.int32))
    explained = jnp.isin(status, jnp.array([code for code in Status if code.explains]))
    for good, code in (
        (stepped, Status.NONFINITE_HYPERPARAMS),
        (derived, Status.NONFINITE_HYPERGRAD),
        (judged, Status.NONFINITE_VAL_LOSS),
        (trained, Status.NONFINITE_TRAIN_STATE),
    ):  # the earliest cause has the last word
        status = jnp.where(good | explained, status, code)
    tuned = trained & judged & derived & stepped
    inner = tree_where(trained, inner, state.inner)
    # What a bad validation batch has touched is not remembered; what goes with s_t must.
    remembered = jnp.where(judged, derived | explained, estimator.follows)
    memory = tree_where(trained & remembered, estimate.memory, state.memory)

    info["train_loss"] = _train_loss(problem, state, window)
    info["hypergrad_norm"] = norm
    metrics = {k: jnp.asarray(v, state.metadata[k].dtype) for k, v in info.items()}
    first_bad = state.metadata["first_bad_step"]
    bad = ~tuned & (first_bad < 0)
    return state.update(
        params=inner.params,
        inner_opt_state=inner.opt_state,
        model_state=inner.model_state,
        hyperparams=tree_where(tuned, new_lam, lam),
        outer_opt_state=tree_where(tuned, slots, state.outer_opt_state),
        step=optax.safe_increment(jnp.asarray(state.step)),
        memory=memory,
        metadata={
            **metrics,
            "status": status.astype(jnp.int32),
            "first_bad_step": jnp.where(bad, state.step, first_bad),
            "n_rejected": state.metadata["n_rejected"] + (~tuned).astype(jnp.int32),
        },
    )


def _train_loss(problem: BilevelProblem, state: BilevelState, window: Window) -> Any:
    """The loss that the window's first gradient is of; XLA computes it once for both."""
    if problem.train_loss is not None:
        loss = problem.train_loss
    elif problem.dynamics.parts is not None:
        loss, _ = problem.dynamics.parts
    else:
        return jnp.nan
    batch = jax.tree.map(lambda x: x[0], window.train)
    return loss(state.params, state.hyperparams, batch)
