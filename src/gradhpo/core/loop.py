"""The loop: outer updates, episodes, and whole runs as one compiled program.

    for m = 1..M:                                     an episode
        memory <- start(memory)                       every estimation_period-th (HyperDistill)
        s <- (phi, fresh slots), memory <- reset
        for each window of the episode:               one outer update, `bilevel_step`
            h, s, memory <- estimate(memory, s, lam, window)
            lam <- outer(lam, h)
        phi <- (1 - r) phi + r w_T                    Reptile; r = 1 goes on from w_T

Everything here is pure: jit it, vmap it over seeds or tasks, scan it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.dynamics import Dynamics, InnerState
from gradhpo.core.estimator import Estimate, Estimator, Loop
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.state import BilevelState, empty_metadata
from gradhpo.core.status import Status
from gradhpo.core.types import Hyper, Params, PyTree
from gradhpo.utils.gradients import tree_is_finite, tree_l2_norm, tree_lerp, tree_where

__all__ = [
    "bilevel_step",
    "end_episode",
    "estimate_theta",
    "fetch",
    "gather",
    "in_windows",
    "init_state",
    "linear_decay",
    "run_episode",
    "run_episodes",
    "start_episode",
    "strengthen",
]

ON_HOST = Window(None, None)  # no resident data set: windows hold the batches themselves
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
        model_state=inner.model_state,
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
        estimate = estimator.estimate(problem, state.memory, state.inner, state.hyperparams, window)
        return _apply(outer_optimizer, problem, state, estimate, window, lr_hyper)

    return step


def _apply(
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
    trained = tree_is_finite(inner[:2])
    judged = jnp.isfinite(info["val_loss"])
    derived = tree_is_finite(h)
    stepped = tree_is_finite(new_lam)
    status = info.pop("status", jnp.zeros((), jnp.int32))
    for good, code in (
        (stepped, Status.NONFINITE_HYPERPARAMS),
        (derived, Status.NONFINITE_HYPERGRAD),
        (judged, Status.NONFINITE_VAL_LOSS),
        (trained, Status.NONFINITE_TRAIN_STATE),
    ):  # the earliest cause has the last word
        status = jnp.where(good, status, code)
    tuned = trained & judged & derived & stepped
    inner = tree_where(trained, inner, state.inner)
    memory = estimate.memory
    if jax.tree.structure(memory) == jax.tree.structure(state.memory):  # else: just allocated
        memory = tree_where(trained & derived, memory, state.memory)

    info["train_loss"] = _train_loss(problem, state, window)
    info["hypergrad_norm"] = tree_l2_norm(h)
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


def start_episode(
    estimator: Estimator, dynamics: Dynamics, state: BilevelState, *, keep_phi: bool = True
) -> BilevelState:
    """Fresh optimizer slots, and a memory in which only what outlives an episode is kept.

    `keep_phi` keeps a copy of the parameters for `end_episode`, which needs them unless the
    Reptile rate is 1.
    """
    inner = dynamics.init(state.params, state.hyperparams)
    memory = state.memory
    if estimator.reset is not None:
        memory = estimator.reset(memory, inner, state.hyperparams)
    return state.update(
        inner_opt_state=strengthen(inner.opt_state),
        memory=memory,
        model_state=inner.model_state,
        phi=state.params if keep_phi else (),
    )


def end_episode(state: BilevelState, lr_reptile: Any = 1.0) -> BilevelState:
    """Reptile: `params = (1 - lr_reptile) phi + lr_reptile w_T`, exact at 0 and 1.

    Source:
        Nichol et al. (2018); Lee et al. (2022), algorithm 3, line 15.
    """
    if jax.tree.structure(state.phi) != jax.tree.structure(state.params):
        return state  # phi was not kept: the rate is 1
    return state.update(params=tree_lerp(state.phi, state.params, lr_reptile), phi=())


def run_episode(
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    problem: BilevelProblem,
    state: BilevelState,
    window: Window,
    lr_hyper: Any = None,
    *,
    resident: Window = ON_HOST,
    keep_phi: bool = False,
    loop: Loop = "scan",
) -> BilevelState:
    """One episode from `state.params`: fresh slots and memory, then every window in turn.

    Args:
        estimator, outer_optimizer, problem: As in `bilevel_step`.
        state: Where the episode starts; its `params` are phi.
        window: The T batches of the episode; T a multiple of `estimator.window`.
        lr_hyper: Outer rate, if there is no outer optimizer.
        resident: Data sets that stay on the device; where one is given, `window` holds
            indices into it and a batch is gathered when its step comes.
        keep_phi: See `start_episode`.
        loop: "scan" or "unroll" (see `gradhpo.core.estimator.fold`).

    Returns:
        The state after the last step, `params = w_T`; see `end_episode`.
    """
    step = bilevel_step(estimator, outer_optimizer)
    state = start_episode(estimator, problem.dynamics, state, keep_phi=keep_phi)

    def body(state, window):
        return step(problem, state, fetch(resident, window), lr_hyper), None

    windows = in_windows(window, estimator.window)
    return lax.scan(body, state, windows, unroll=loop == "unroll")[0]


def in_windows(window: Window, steps: int) -> Window:
    """The batches of an episode regrouped as (T / steps, steps, …)."""
    return jax.tree.map(lambda x: x.reshape((-1, steps) + x.shape[1:]), window)


def fetch(resident: Window, window: Window) -> Window:
    """Batches in place of indices, for the sides of the window that have a resident data set."""
    sides = zip(resident, window, strict=True)
    return Window(*(side if data is None else gather(data, side) for data, side in sides))


def gather(data: PyTree, indices: PyTree) -> PyTree:
    """The examples of a resident data set named by an index array of any shape.

    >>> print(gather(jnp.array([10, 20, 30]), jnp.array([2, 0])))
    [30 10]
    """
    return jax.tree.map(lambda x: jnp.asarray(x)[indices], data)


def run_episodes(
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    problem: BilevelProblem,
    state: BilevelState,
    windows: Window,
    lr_hyper: jax.Array | None = None,
    *,
    lr_reptile: float = 1.0,
    estimation_period: int = 1,
    resident: Window = ON_HOST,
    observe: Callable[[BilevelState], PyTree] = lambda state: state.metadata,
    loop: Loop = "scan",
) -> tuple[BilevelState, PyTree]:
    """A whole run of M episodes as one pure function; vmap it over seeds.

    Args:
        windows: Data (or indices into `resident`) with leading axes (M, T).
        lr_hyper: Outer rate of every episode, shape (M,), or None with an outer optimizer;
            `linear_decay` makes the usual one.
        lr_reptile: Reptile rate, a Python number; 1 goes on from w_T.
        estimation_period: `estimator.start` runs before episodes 1, 1 + period, …
        observe: Called on the state of every episode with `params = w_T`.

    Returns:
        `(state, history)`: `params` are phi after the last episode, `history` the
        observations stacked over M.
    """
    episodes = jax.tree.leaves(windows)[0].shape[0]

    def body(state, x):
        m, window, rate = x
        if estimator.start is not None:
            state = lax.cond(
                m % estimation_period == 0,
                lambda state: estimate_theta(estimator, problem, state, window, resident),
                lambda state: state,
                state,
            )
        state = run_episode(
            estimator,
            outer_optimizer,
            problem,
            state,
            window,
            rate,
            resident=resident,
            keep_phi=lr_reptile != 1,
            loop=loop,
        )
        seen = observe(state)
        return end_episode(state, lr_reptile), seen

    xs = (jnp.arange(episodes, dtype=jnp.int32), windows, lr_hyper)
    return lax.scan(body, state, xs)


def estimate_theta(
    estimator: Estimator,
    problem: BilevelProblem,
    state: BilevelState,
    window: Window,
    resident: Window = ON_HOST,
) -> BilevelState:
    """Run `estimator.start` on the data of the coming episode, from fresh slots.

    Its T train batches and its last validation batch are used; `lam` stays as it is.
    """
    assert estimator.start is not None
    inner = problem.dynamics.init(state.params, state.hyperparams)
    window = fetch(resident, window)
    memory = estimator.start(problem, state.memory, inner, state.hyperparams, window)
    return state.update(memory=memory)


def linear_decay(lr_hyper: float, episodes: int, dtype: Any = jnp.float32) -> jax.Array:
    """`lr_hyper (1 - (m - 1) / M)` for m = 1..M.

    >>> print(linear_decay(1.0, 4))
    [1.   0.75 0.5  0.25]
    """
    return jnp.asarray(lr_hyper * (1 - jnp.arange(episodes) / episodes), dtype)
