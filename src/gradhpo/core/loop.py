"""The loop: episodes, and whole runs as one compiled program.

for m = 1..M:                                     an episode
    memory <- start(memory)                       every estimation_period-th
    s <- begin(phi, lam, draw), memory <- reset   by default (phi, fresh slots)
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

from gradhpo.core.delay import delayed
from gradhpo.core.episode import (
    ON_HOST,
    cut_episode,
    end_episode,
    episode_data,
    finished,
    recovered,
    start_episode,
)
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.problem import BilevelProblem, Window, check_window
from gradhpo.core.source import fetch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer, bilevel_step, strengthen
from gradhpo.core.types import PyTree
from gradhpo.utils.settings import check_rate

__all__ = ["linear_decay", "prepare_episode", "run_episode", "run_episodes"]


def run_episode(
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    problem: BilevelProblem,
    state: BilevelState,
    window: Window | None,
    lr_hyper: Any = None,
    *,
    draw: Any = None,
    resident: Window = ON_HOST,
    keep_phi: bool = False,
    loop: Loop = "scan",
) -> BilevelState:
    """One episode: its start, then every window in turn.

    Args:
        estimator, outer_optimizer, problem: As in `bilevel_step`.
        state: Where the episode starts; its `params` are phi.
        window: The T batches of the episode, T a multiple of `estimator.unroll_steps`; None where
            `problem.begin` brings them.
        lr_hyper: Outer rate, if there is no outer optimizer.
        draw: For `problem.begin`, see `start_episode`.
        resident: Data sets that stay on the device; where one is given, `window` holds
            indices into it and a batch is gathered when its step comes.
        keep_phi: See `start_episode`.
        loop: "scan" or "unroll" (see `gradhpo.core.estimator.fold`).

    Returns:
        The state after the last step, `params = w_T`; see `end_episode`. Nothing is raised for an
        update that was rejected: `state.status_counts` and the metadata tell of it.
    """
    before = state.inner
    state, origin, own = start_episode(estimator, problem, state, draw, keep_phi=keep_phi)
    window, resident = episode_data(window, own, resident)
    T = check_window(window)
    first, windows = cut_episode(window, estimator)
    if estimator.room is not None and estimator.room.missing(state.memory):
        raise ValueError(
            "this state's memory keeps a batch whose shape is not known yet, so it cannot be "
            "scanned: give init_state a window (or init a train_batch)."
        )

    def update(estimator, state, window, origin=None):
        step = bilevel_step(estimator, outer_optimizer)
        return step(problem, state, fetch(resident, window), lr_hyper, origin)

    def body(state, window):
        return update(estimator, state, window), None

    if first is not None:
        state = update(delayed(estimator, estimator.lead, loop=loop), state, first)
    elif origin is not None:  # the first window alone looks back at the start
        state = update(estimator, state, jax.tree.map(lambda x: x[0], windows), origin)
        windows = jax.tree.map(lambda x: x[1:], windows)
    if check_window(windows):
        state = lax.scan(body, state, windows, unroll=loop == "unroll")[0]
    return finished(recovered(problem, before, state), T)


def run_episodes(
    estimator: Estimator,
    outer_optimizer: OuterOptimizer,
    problem: BilevelProblem,
    state: BilevelState,
    windows: Window | None,
    lr_hyper: jax.Array | None = None,
    *,
    draws: PyTree = None,
    episodes: int | None = None,
    lr_reptile: float = 1.0,
    estimation_period: int = 1,
    resident: Window = ON_HOST,
    observe: Callable[[BilevelState], PyTree] = lambda state: state.metadata,
    loop: Loop = "scan",
) -> tuple[BilevelState, PyTree]:
    """A whole run of M episodes as one pure function; vmap it over seeds.

    Args:
        windows: Data (or indices into `resident`) with leading axes (M, T); None where
            `problem.begin` brings them.
        draws: For `problem.begin`, with leading axis M; see `start_episode`.
        episodes: M, where neither windows nor draws say it.
        lr_hyper: Outer rate of every episode, shape (M,), or None with an outer optimizer;
            `linear_decay` makes the usual one.
        lr_reptile: Reptile rate, a Python number; 1 goes on from w_T.
        estimation_period: `estimator.start` runs before episodes 1, 1 + period, … since `init`.
        observe: Called on the state of every episode with `params = w_T`.

    Returns:
        `(state, history)`: `params` are phi after the last episode, `history` the
        observations stacked over M. A compiled program cannot stop at a rejected update:
        `state.status_counts` and `first_bad_step` tell of them, of each episode its metadata.
    """
    episodes = next((x.shape[0] for x in jax.tree.leaves((windows, draws))), episodes)
    if episodes is None:
        raise ValueError("run_episodes needs windows, draws, or episodes= to know how many.")
    if lr_hyper is not None and jnp.shape(lr_hyper) != (episodes,):
        raise ValueError(
            f"lr_hyper must hold one rate for each of the {episodes} episodes, got shape "
            f"{jnp.shape(lr_hyper)}; linear_decay(rate, {episodes}) makes the usual ones."
        )
    if lr_hyper is not None and not isinstance(lr_hyper, Tracer):
        for rate in np.asarray(lr_hyper):
            check_rate("every rate of lr_hyper", rate)

    def body(state, x):
        window, draw, rate = x
        if estimator.start is not None:
            state = lax.cond(
                state.episode % estimation_period == 0,
                lambda state: prepare_episode(estimator, problem, state, window, draw, resident),
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
            draw=draw,
            resident=resident,
            keep_phi=lr_reptile != 1,
            loop=loop,
        )
        seen = observe(state)
        return end_episode(state, lr_reptile, estimator.tasks), seen

    return lax.scan(body, strengthen(state), (windows, draws, lr_hyper), length=episodes)


def prepare_episode(
    estimator: Estimator,
    problem: BilevelProblem,
    state: BilevelState,
    window: Window | None,
    draw: Any = None,
    resident: Window = ON_HOST,
) -> BilevelState:
    """Run `estimator.start` on the data of the coming episode, from its s_0; `lam` stays."""
    assert estimator.start is not None
    begun, _, own = start_episode(estimator, problem, state, draw, keep_phi=False)
    window, resident = episode_data(window, own, resident)
    memory = estimator.start(
        problem, state.memory, begun.inner, state.hyperparams, fetch(resident, window)
    )
    return state.update(memory=memory)


def linear_decay(lr_hyper: float, episodes: int, dtype: Any = jnp.float32) -> jax.Array:
    """`lr_hyper (1 - (m - 1) / M)` for m = 1..M.

    >>> print(linear_decay(1.0, 4))
    [1.   0.75 0.5  0.25]
    """
    check_rate("lr_hyper", lr_hyper)
    return jnp.asarray(lr_hyper * (1 - jnp.arange(episodes) / episodes), dtype)
