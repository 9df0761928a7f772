"""One episode: where it begins, which data it has, and where the next one goes on from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Estimator
from gradhpo.core.inspect import started_hyperparams
from gradhpo.core.problem import BilevelProblem, Window, check_window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.state import BilevelState
from gradhpo.core.step import per_task, strengthen
from gradhpo.core.types import Hyper, PyTree
from gradhpo.utils.gradients import tree_is_finite, tree_lerp, tree_where
from gradhpo.utils.validation import check_same_avals, leaves_with_names

__all__ = [
    "ON_HOST",
    "Begun",
    "begin",
    "cut_episode",
    "end_episode",
    "episode_data",
    "finished",
    "in_windows",
    "recovered",
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


def finished(state: BilevelState, T: int) -> BilevelState:
    """The state after an episode of T steps, counted; counters never wrap around."""
    most = jnp.iinfo(jnp.int32).max
    drawn = jnp.where(state.drawn > most - T, most, state.drawn + T)
    return state.update(episode=optax.safe_increment(jnp.asarray(state.episode)), drawn=drawn)


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
