"""The episode that a check is about: its start, its data, and its loss as a function of lam."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.core.dynamics import Dynamics, InnerState
from gradhpo.core.estimator import fold, whole
from gradhpo.core.inspect import check_problem, has_convolution, started_hyperparams
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.step import strengthen
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper, Loop, Params, Scalar
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_last

__all__ = ["Episode", "begin_in_float64", "loop_for", "loss_after"]


class Episode(NamedTuple):
    """What every method sees of a check."""

    problem: BilevelProblem
    inner: InnerState  # s_0
    lam: Hyper
    window: Window  # of T steps
    origin: Origin | None  # where s_0 depends on lam
    steps: int  # T
    loop: Loop  # over training steps


def begin_in_float64(task: Task, steps: int, inner: InnerState | None, key: Any) -> Episode:
    """An episode of so many steps, all that floats in float64; 64-bit types must be on.

    Args:
        inner: A state to go on from, which then is a constant; None: a fresh start.

    Raises:
        TypeError, ValueError: losses or training step are not what they have to be.
    """
    problem = task.problem
    dynamics = problem.dynamics
    problem = problem._replace(
        dynamics=dynamics._replace(init=_with_wide_slots(dynamics)),
        begin=problem.begin and _widened(problem.begin),
    )
    params, lam, model_state = _wide((task.params, task.hyperparams, task.model_state))
    task = task.replace(problem=problem, params=params, hyperparams=lam, model_state=model_state)
    fresh, window = task.begin(steps, key)
    lam, origin = strengthen(lam), None
    if inner is None:
        inner = fresh
        if started_hyperparams(problem, task.origin(key), lam):
            origin = task.origin(key)
    else:
        inner = _as_wide_as(fresh, inner)
    start, window = strengthen(inner), _wide(window)
    check_problem(problem, start, lam, window)
    loop = loop_for(problem, start, lam, window)
    return Episode(problem, start, lam, window, origin, steps, loop)


def loop_for(problem: BilevelProblem, inner: InnerState, lam: Hyper, window: Window) -> Loop:
    """How to loop over training steps: "host" where they convolve on CPU, else "scan"."""
    convolves = has_convolution(problem, inner, lam, tree_last(window.train))
    return "host" if convolves and jax.default_backend() == "cpu" else "scan"


def loss_after(episode: Episode) -> Callable[[Hyper], Scalar]:
    """`lam -> L_val(s_T(lam), lam)`, by plain training; compiled.

    A model state is a constant for the step that reads it (see `gradhpo.core.losses`): for every
    lam it is what training at `episode.lam` has left behind there.
    """
    problem, inner, lam, window, origin, _, loop = episode
    end, model_states = fold(_remember, problem, lam, inner, window.train, loop=loop)
    batches = window.train, model_states

    def loss(lam):
        start = inner if origin is None else whole(_begun, loop)(problem, origin, lam)
        start = start._replace(model_state=inner.model_state)
        last, _ = fold(_advance, problem, lam, start, batches, loop=loop)
        batch = tree_last(window.val)
        return whole(_judge, loop)(problem, last.params, lam, batch, end.model_state)

    return loss if loop == "host" else jax.jit(loss)


def _remember(problem, lam, inner, batch):
    return problem.dynamics.step(inner, lam, batch), inner.model_state


def _advance(problem, lam, inner, x):
    batch, model_state = x
    return problem.dynamics.step(inner._replace(model_state=model_state), lam, batch), None


def _begun(problem, origin, lam):
    return begin_episode(problem, origin, lam)[0]


def _judge(problem, params, lam, batch, model_state):
    return loss_value(problem.outer_loss, params, lam, batch, model_state)


def _with_wide_slots(dynamics: Dynamics) -> Callable[[Params, Hyper], InnerState]:
    """Its `init` with float64 slots; with slots as they are made where the optimizer takes no
    others. `optax.MultiSteps` adds up in float32, whatever the parameters are."""

    def init(params, lam):
        made = dynamics.init(params, lam)
        wide = _wide(made)
        if dynamics.parts is not None:
            opt, w = dynamics.parts.make_optimizer(lam), split(made.params)[0]
            try:
                jax.eval_shape(opt.update, w, wide.opt_state, w)
            except TypeError:
                return wide._replace(opt_state=made.opt_state)
        return wide

    return init


def _as_wide_as(fresh: InnerState, inner: InnerState) -> InnerState:
    """A state of a run; if it is none of this problem, that is found when a step is tried."""
    wide = _wide(inner)
    if jax.tree.structure(wide) != jax.tree.structure(fresh):
        return wide
    return jax.tree.map(lambda x, like: jnp.asarray(x, _dtype(like)), wide, fresh)


def _widened(function: Callable) -> Callable:
    return lambda *arguments: _wide(function(*arguments))


def _wide(tree: Any) -> Any:
    """Floating leaves as float64 arrays; integers and keys as they are."""

    def wide(x):
        return jnp.asarray(x, jnp.float64 if jnp.issubdtype(_dtype(x), jnp.floating) else None)

    return jax.tree.map(wide, tree)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
