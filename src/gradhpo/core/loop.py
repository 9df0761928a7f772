"""The loop: episodes, and whole runs as one compiled program.

for m = 1..M:                                     an episode
    memory <- start(memory)                       every estimation_period-th
    s <- begin(phi, lam, draw), memory <- reset   by default (phi, fresh slots)
    for each window of the episode:               one outer update, `bilevel_step`
    phi <- (1 - r) phi + r w_T                    Reptile; r = 1 goes on from w_T
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gradhpo.core.delay import delayed
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.inspect import started_hyperparams
from gradhpo.core.problem import BilevelProblem, Window, check_window
from gradhpo.core.source import fetch
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer, bilevel_step, per_task, strengthen
from gradhpo.core.types import Hyper, PyTree
from gradhpo.utils.gradients import tree_is_finite, tree_lerp, tree_where
from gradhpo.utils.validation import check_rate, check_same_avals, leaves_with_names

__all__ = [
    "ON_HOST",
    "Begun",
    "begin",
    "cut_episode",
    "end_episode",
    "episode_data",
    "finished",
    "in_windows",
    "linear_decay",
    "prepare_episode",
    "recovered",
    "run_episode",
    "run_episodes",
    "start_episode",
    "started",
]

ON_HOST = Window(None, None)  # no resident data set: windows hold the batches themselves


class Begun(NamedTuple):
    """An episode that has begun."""

    state: BilevelState
    origin: Origin | None  # where s_0 depends on lam and the method can see it
    window: Window | None  # where the start brought the data


def start_episode(
    estimator: Estimator,
    problem: BilevelProblem,
    state: BilevelState,
    draw: Any = None,
    *,
    keep_phi: bool = True,
) -> Begun:
    """s_0, and a memory in which only what outlives an episode is kept.

    Args:
        draw: For `problem.begin`: a task or a PRNG key, with `over_tasks` one for each task along
            the leading axis. None: a key that depends on `state.episode` alone.
        keep_phi: Keep a copy of the weights that the episode started from for `end_episode`, which
            needs them unless the Reptile rate is 1.

    Raises:
        TypeError: `begin` returns no `Start`.
        ValueError: its params or model state are not shaped like those of the state, or its window
            depends on the hyperparameters; the message names the leaf.
    """
    lam = state.hyperparams
    origin, inner, window = begin(estimator, problem, state, draw)
    memory = state.memory
    if estimator.reset is not None:
        memory = estimator.reset(memory, inner, lam)
    reached = started(estimator, problem, origin, lam)  # refuses batches that depend on lam
    state = state.update(
        params=inner.params,
        inner_opt_state=inner.opt_state,
        memory=memory,
        model_state=inner.model_state,
        phi=origin.phi if keep_phi else (),
    )
    looks_back = estimator.starts and reached and not estimator.lead
    return Begun(state, origin if looks_back else None, window)


def begin(
    estimator: Estimator, problem: BilevelProblem, state: BilevelState, draw: Any = None
) -> tuple[Origin, InnerState, Window | None]:
    """What an episode is made from, its s_0, and the data that come with it; see
    `start_episode`."""
    tasks = estimator.tasks
    if draw is None and problem.begin is not None:
        draw = jax.random.fold_in(jax.random.key(0), state.episode)
        if tasks is not None:
            draw = jax.random.split(draw, tasks)
    origin = Origin(state.inner._replace(opt_state=()), draw)
    if tasks is not None:
        _check_tasks("the state's weights", origin.phi, tasks)
        _check_tasks("draw", draw, tasks)
    one = per_task(estimator, lambda origin: begin_episode(problem, origin, state.hyperparams))
    inner, window = one(origin)
    if window is not None and tasks is not None:
        window = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), window)  # the step comes first
    inner = strengthen(inner)
    _check_started(state.inner, inner)
    return origin, inner, window


def started(estimator: Estimator, problem: BilevelProblem, origin: Origin, lam: Hyper) -> list[str]:
    """Names of the leaves of `lam` that this start depends on; see `started_hyperparams`."""
    if estimator.tasks is not None:
        origin = jax.eval_shape(lambda origin: jax.tree.map(lambda x: x[0], origin), origin)
    return started_hyperparams(problem, origin, lam, differentiates=estimator.differentiates)


def _check_tasks(what: str, tree: PyTree, tasks: int) -> None:
    for name, leaf in leaves_with_names(tree):
        if jnp.shape(leaf)[:1] != (tasks,):
            raise ValueError(
                f"every leaf of {what} needs the {tasks} tasks along its leading axis; but leaf "
                f"{name} has the shape {jnp.shape(leaf)}. A state is made by init with the same "
                "number of tasks; a draw is one for each task, stacked."
            )


def _check_started(before: InnerState, started: InnerState) -> None:
    """An episode begins with the weights and the model state of one kind, whatever their values."""
    old, new = ({"params": s.params, "model_state": s.model_state} for s in (before, started))
    check_same_avals(
        *jax.eval_shape(lambda: (old, new)),
        rule="begin must return a Start of the structure, shapes and dtypes that init was given",
        remedy="Give init params (and a model_state) like those that episodes begin with; a "
        "hyperparameter wider than the parameters is cast inside begin.",
    )


def end_episode(
    state: BilevelState, lr_reptile: Any = 1.0, tasks: int | None = None
) -> BilevelState:
    """Reptile: `(1 - lr_reptile) phi + lr_reptile w_T`, exact at 0 and 1, for the weights and the
    floating leaves of the model state.

    Args:
        tasks: As in `over_tasks`: w_T is then the mean over the tasks.

    Source:
        Nichol et al. (2018); Lee et al. (2022), algorithm 3, line 15.
    """
    end = state.params, state.model_state
    if tasks is not None:
        end = jax.tree.map(_mean_over_tasks, end)
    if isinstance(state.phi, InnerState):  # else phi was not kept: the rate is 1
        end = tree_lerp((state.phi.params, state.phi.model_state), end, lr_reptile)
    return state.update(params=end[0], model_state=end[1], phi=())


def _mean_over_tasks(x: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.broadcast_to(jnp.mean(x, axis=0), x.shape) if floating else x


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
        The state after the last step, `params = w_T`; see `end_episode`.
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


def finished(state: BilevelState, T: int) -> BilevelState:
    """The state after an episode of T steps, counted."""
    return state.update(episode=state.episode + 1, drawn=state.drawn + T)


def recovered(problem: BilevelProblem, before: InnerState, state: BilevelState) -> BilevelState:
    """The state after an episode, with the weights and the model state of `before` it where they
    have become NaN or infinite: the finite guard undoes steps, down to a start of the user's own,
    which may not be finite itself."""
    if problem.begin is None:
        return state
    new, old = (state.params, state.model_state), (before.params, before.model_state)
    params, model_state = tree_where(tree_is_finite(new), new, old)
    return state.update(params=params, model_state=model_state)


def episode_data(
    window: Window | None, own: Window | None, resident: Window
) -> tuple[Window, Window]:
    """`(window, resident)`: the batches of an episode (or rows of `resident`), from the sources or
    from its start.

    Raises:
        ValueError: both bring batches, or neither does.
    """
    if (window is None) == (own is None):
        given = "neither does" if own is None else "both do"
        raise ValueError(
            "the batches of an episode come from the sources of the run or with Start(params, "
            f"window) from begin, but {given}."
        )
    return (window if own is None else own), resident  # type: ignore[return-value]


def cut_episode(window: Window, estimator: Estimator) -> tuple[Window | None, Window]:
    """`(first, windows)` of the batches of an episode, `windows` as by `in_windows`. `first` is the
    first window of a method with a lead, longer by that; None if there is no lead."""
    lead, steps = estimator.lead, estimator.unroll_steps
    if not lead:
        return None, in_windows(window, steps)
    if check_window(window) < lead + steps:
        raise ValueError(
            f"an episode of T={check_window(window)} inner steps has no room for a window of "
            f"{steps} after {lead} steps of training."
        )
    first, rest = (
        jax.tree.map(lambda x: x[part], window)  # noqa: B023
        for part in (slice(lead + steps), slice(lead + steps, None))
    )
    return first, in_windows(rest, steps)


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
    return jax.tree.map(lambda x: x.reshape((T // steps, steps) + x.shape[1:]), window)


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
        observations stacked over M.
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
