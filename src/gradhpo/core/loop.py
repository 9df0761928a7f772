"""The loop: episodes, and whole runs as one compiled program.

for m = 1..M:                                     an episode
    memory <- start(memory)                       every estimation_period-th (HyperDistill)
    s <- (phi, fresh slots), memory <- reset
    for each window of the episode:               one outer update, `bilevel_step`
    phi <- (1 - r) phi + r w_T                    Reptile; r = 1 goes on from w_T
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gradhpo.core.dynamics import Dynamics
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.problem import BilevelProblem, Window, check_window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer, bilevel_step, strengthen
from gradhpo.core.types import PyTree
from gradhpo.utils.gradients import tree_lerp
from gradhpo.utils.validation import check_rate

__all__ = [
    "end_episode",
    "estimate_theta",
    "fetch",
    "gather",
    "in_windows",
    "linear_decay",
    "run_episode",
    "run_episodes",
    "start_episode",
]

ON_HOST = Window(None, None)  # no resident data set: windows hold the batches themselves


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
    if getattr(state.memory, "data", ()) is None:
        raise ValueError(
            "this state's memory keeps a batch whose shape is not known yet, so it cannot be "
            "scanned: give init_state a window (or init a train_batch)."
        )
    step = bilevel_step(estimator, outer_optimizer)
    state = start_episode(estimator, problem.dynamics, state, keep_phi=keep_phi)

    def body(state, window):
        return step(problem, state, fetch(resident, window), lr_hyper), None

    windows = in_windows(window, estimator.window)
    return lax.scan(body, state, windows, unroll=loop == "unroll")[0]


def in_windows(window: Window, steps: int) -> Window:
    """The batches of an episode regrouped as (T / steps, steps, …).

    Raises:
        ValueError: the leaves disagree about T, or T is not a multiple of `steps`.
    """
    T = check_window(window)
    if T % steps:
        raise ValueError(
            f"an episode of T={T} inner steps does not divide into windows of {steps}, which this "
            "method takes: give a multiple of it."
        )
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
    if lr_hyper is not None and jnp.shape(lr_hyper) != (episodes,):
        raise ValueError(
            f"lr_hyper must hold one rate for each of the {episodes} episodes, got shape "
            f"{jnp.shape(lr_hyper)}; linear_decay(rate, {episodes}) makes the usual ones."
        )
    if lr_hyper is not None and not isinstance(lr_hyper, Tracer):
        for rate in np.asarray(lr_hyper):
            check_rate("every rate of lr_hyper", rate)

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
    check_rate("lr_hyper", lr_hyper)
    return jnp.asarray(lr_hyper * (1 - jnp.arange(episodes) / episodes), dtype)
