"""A whole run of a task by an estimator, without a class."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from gradhpo.checkpoint.settings import CheckpointArgument, as_settings
from gradhpo.core.declared import Declared
from gradhpo.core.estimator import Estimator, Loop, check_estimator
from gradhpo.core.outer import check_outer, check_outer_step
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer, init_state
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper
from gradhpo.driver._recompilation import note_compilation
from gradhpo.driver.caches import cached
from gradhpo.driver.data import Data
from gradhpo.driver.failure import OnFailure, check_on_failure
from gradhpo.driver.hooks import Hook, Log
from gradhpo.driver.plan import Plan
from gradhpo.driver.run import run
from gradhpo.driver.setup import Setup, check_length, check_state
from gradhpo.driver.spaces import within_spaces
from gradhpo.utils.logging import MetricLogger
from gradhpo.utils.settings import check_callable, check_choice, check_count, check_fraction
from gradhpo.utils.validation import check_arrays

__all__ = ["checked_run", "found_again", "tune"]


def tune(
    task: Task,
    estimator: Estimator | Callable[[Loop], Estimator],
    outer: OuterOptimizer = None,
    *,
    episodes: int,
    T: int | None = None,
    of: int | None = None,
    lr_hyper: float | None = None,
    lr_reptile: float = 1.0,
    estimation_period: int = 1,
    state: BilevelState | None = None,
    get_task: Callable[[], Any] | None = None,
    callback: Hook | None = None,
    logger: MetricLogger | None = None,
    natural: Callable[[Hyper], Any] | None = None,
    progress: bool | None = None,
    on_failure: OnFailure = "skip",
    loop: str = "auto",
    strict: bool = False,
    checkpoint: CheckpointArgument = None,
) -> BilevelState:
    """Tune the hyperparameters of a task while its model trains: so many episodes of T steps.

    Every episode starts with fresh optimizer slots and a fresh memory (theta and keys survive),
    draws T batches of either kind, alternately and in order, and is one compiled call or less: with
    neither callback nor logger several episodes go into one. At most two states are held at a time,
    and none is donated.

    Args:
        task: What is tuned. Its sources of batches are used from `state.drawn` on; functions go on
            by themselves.
        estimator: The method, such as `gradhpo.reverse(20)`, or a function from the kind of loop
            to the estimator, for problems with convolutions: `lambda loop: reverse(20, loop=loop)`.
            Programs are kept by its identity: make it once.
        outer: An Optax optimizer, a `gradhpo.Outer`, or None with `lr_hyper`.
        episodes: Of this call.
        T: Inner steps of an episode; left out where `begin` returns the batches.
        of: Episodes that the decay refers to, counted from `init`: `episodes=4` is
            `episodes=2, of=4` twice, bit for bit. None: those of this call, starting anew.
        lr_hyper: Outer rate; it is `lr_hyper (1 - m / of)` in an episode that follows m others.
        lr_reptile: Where the next episode starts: 1 at w_T, 0 where this one did.
        estimation_period: Episodes between two fits of methods that have one (HyperDistill).
        state: Where to go on from: the result of an earlier call, `error.state` of one that was
            interrupted, or (at `lr_reptile=1`, without `over_tasks`) a callback's. None: the task's
            own start.
        get_task: The draw for `problem.begin`, once an episode: a tree of arrays or a PRNG key;
            with `over_tasks(estimator, n)` it is called n times and stacked. None: a key that
            depends on the number of the episode alone.
        callback: `callback(episode, state)` after every episode, counted from 1 over all calls,
            with `state.params = w_T`. Returning False, or raising `gradhpo.StopRun`, ends the run.
        logger: Gets the metrics and the hyperparameters after every episode, at `state.step`; what
            is not one number by its mean, least and largest. Closing it is up to the caller.
        natural: The hyperparameters as they shall be logged; None: by `task.natural`.
        progress: A progress line on stderr, with the losses and the first hyperparameters; None:
            where that is a terminal.
        on_failure: What follows an update that the finite guard has rejected, and undone (a
            `Status` that `rejects`): "skip" goes on with the next one and says so once, at the end;
            "stop" ends the run after the episode, with a warning; "raise" raises
            `gradhpo.UpdateRejected` there. Both look at the state after every episode, so each is a
            compiled call of its own.
        loop: "scan", "unroll", "host" or "auto"; see
            `gradhpo.algorithms.EstimatorOptimizer`.
        strict: Raise where others are warned before the first episode.
        checkpoint: A directory (or `gradhpo.checkpoint.Checkpoints`) for the states of this run.
            The same call with a directory that holds some goes on from the newest and ends where
            it would have ended, bit for bit; `state` is then where the run began. Ctrl-C and
            SIGTERM end it after the episode, saved. See docs/checkpoints.md.

    Returns:
        The final state; its `params` are where the next episode would start.

    Raises:
        TypeError, ValueError: before or at the first episode, naming what is wrong and the remedy.
        UpdateRejected: with `on_failure="raise"`, after an episode in which an update was rejected.
        KeyboardInterrupt: after the episode that a first Ctrl-C fell into, or at the second.
            Whatever is raised while the run is on has the last good state as `error.state`.

    Warns:
        GradhpoWarning: of what cannot be tuned or trained; at the end of updates that were
            rejected, or of more than half that were inaccurate.

    >>> import jax.numpy as jnp
    >>> from gradhpo import BilevelProblem, InOrder, Task, from_update, one_step
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    ... )
    >>> task = Task(problem, 2.0, 0.5, InOrder(jnp.ones(20)), InOrder(jnp.zeros(20)))
    >>> state = tune(task, one_step(), episodes=2, T=10, lr_hyper=0.01)
    >>> print(int(state.step), state.hyperparams)
    20 0.55...
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be a gradhpo.Task, got {type(task).__name__}.")
    name, spaces, task = "tune", task.declared, task.stored
    if outer is not None:
        check_outer("outer", outer)
    if spaces is not None:
        outer = within_spaces(outer, spaces, task.hyperparams)
        if natural is not None:
            natural = _of_values(natural, spaces)
    given = _as_it_is(estimator) if isinstance(estimator, Estimator) else estimator
    check_callable("estimator", given, "loop -> gradhpo.Estimator, or an Estimator")
    check_choice("loop", loop, ("auto", "scan", "unroll", "host"))
    period = check_count("estimation_period", estimation_period)
    losses = {"task.problem.outer_loss": task.problem.outer_loss}
    settings = (name, task.problem, given, outer, period, loop, strict)
    setup = found_again(_setup, settings, losses, strict=False)
    check_estimator("tune", setup.estimator)
    if state is None:
        state = init_state(
            task.problem,
            setup.estimator,
            outer,
            task.params,
            task.hyperparams,
            model_state=task.model_state,
        )
    return checked_run(
        setup,
        state,
        Plan(episodes, T, of, lr_hyper, lr_reptile, on_failure),
        Data(task.train, task.val, get_task, setup.estimator.tasks),
        callback=callback,
        logger=logger,
        natural=natural or task.natural,
        progress=progress,
        checkpoint=checkpoint,
    )


@cached
def _as_it_is(estimator: Estimator) -> Callable[[Loop], Estimator]:
    return lambda loop: estimator


def _of_values(natural: Callable[[Hyper], Any], spaces: Declared) -> Callable[[Hyper], Any]:
    return lambda lam: natural(spaces.value(lam))


@cached
def _setup(*settings: Any) -> Setup:
    name, problem, method, outer, period, loop, strict = settings
    return Setup(name, problem, method, outer, period, loop, strict)


def found_again(make: Any, arguments: tuple, functions: dict[str, Any], *, strict: bool) -> Setup:
    """The setup for these arguments, with a warning when call after call brings new functions.

    Args:
        make: A function that keeps what it has made, see `kept`; its first argument is a setting
            or the name of a method.
        functions: Those by which it is known, by their names.
    """
    before = make.cache_info().misses
    try:
        setup = make(*arguments)
    except TypeError as error:
        if "unhashable" in str(error):
            error.add_note(
                "gradhpo: settings and losses are static under jit and must be hashable; wrap "
                "the one that is not in a function."
            )
        raise
    missed = make.cache_info().misses > before
    note_compilation(setup.name, functions, missed, strict=strict)
    return setup


def checked_run(
    setup: Setup,
    state: BilevelState,
    plan: Plan,
    data: Data,
    *,
    callback: Hook | None = None,
    logger: MetricLogger | None = None,
    natural: Callable[[Hyper], Any] | None = None,
    progress: bool | None = None,
    checkpoint: CheckpointArgument = None,
) -> BilevelState:
    """`run` with arguments as users give them; see `tune`."""
    episodes = check_count("episodes" if setup.name == "tune" else "M", plan.episodes)
    data.check(setup.problem.begin)
    T = plan.T
    if T is not None or not data.with_start:
        T = check_length(setup.name, setup.estimator, T)
    check_outer_step(setup.name, setup.outer, plan.lr_hyper)
    plan = plan._replace(
        episodes=episodes,
        T=T,
        lr_hyper=None if plan.lr_hyper is None else float(plan.lr_hyper),
        lr_reptile=check_fraction("lr_reptile", plan.lr_reptile),
        on_failure=check_on_failure(plan.on_failure),
    )
    if callback is not None:
        check_callable("callback", callback, "(episode, state)")
    if logger is not None:
        if not callable(getattr(logger, "log", None)):
            raise TypeError(
                "logger must be one of gradhpo.utils.logging, with log(metrics, step), got "
                f"{logger!r}. A function of your own goes into callback=."
            )
    if natural is not None:
        check_callable("natural", natural, "hyperparams -> dictionary")
    check_state(state)
    check_arrays("the state", state)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        raise TypeError(
            f"{'tune' if setup.name == 'tune' else 'run'} draws its batches on the host, episode "
            "after episode, and cannot be traced by jit, vmap or scan: call it outside of them, or "
            "take gradhpo.run_episodes, which is one program."
        )
    if plan.of is not None:
        end = int(state.episode) + plan.episodes
        if end > check_count("of", plan.of):
            raise ValueError(
                f"this run would end after episode {end}, beyond of={plan.of}, where the outer "
                "rate has decayed to zero."
            )
    hooks = [] if logger is None else [Log(logger, natural)]
    hooks += [] if callback is None else [callback]
    settings = as_settings(checkpoint)
    return run(setup, state, plan, data, tuple(hooks), progress, natural, settings)
