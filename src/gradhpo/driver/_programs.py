"""The compiled programs of a run and of single steps: one set for each way to loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.core import episode as core
from gradhpo.core import loop as loops
from gradhpo.core.delay import delayed
from gradhpo.core.estimator import Estimator
from gradhpo.core.outer import as_outer
from gradhpo.core.problem import check_window
from gradhpo.core.source import fetch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import apply_estimate, bilevel_step
from gradhpo.driver._packed import Packed
from gradhpo.driver.setup import Loops, Setup
from gradhpo.utils._calls import explain_loops

__all__ = ["Programs", "end_episode", "programs"]


class Programs(NamedTuple):
    """Functions of a run. None donates the state that it is given: every state that a caller has
    seen stays valid, at the price of holding two of them while an episode runs."""

    fit: Callable[..., BilevelState]  # (state, window, draw, resident)
    episode: Callable[..., BilevelState]  # (state, window, draw, rate, resident, keep_phi)
    episodes: Callable[..., tuple[BilevelState, dict[str, Any]]] | None
    # (state, n, windows, rates, resident) -> (state after n episodes, fields of the last w_T where
    # they are others); None on the host


def programs(setup: Setup, looped: Loops) -> Programs:
    """The programs of a setup, looped so; they are made once."""
    return setup.remember(looped, lambda: _programs(setup, looped))


def _programs(setup: Setup, looped: Loops) -> Programs:
    problem, fitting = setup.problem, setup.method(looped.fit)

    def fit(state, window, draw, resident):
        return loops.prepare_episode(fitting, problem, state, window, draw, resident)

    fit = fit if looped.fit == "host" else jax.jit(fit)
    if looped.episode == "host":
        return Programs(fit, _on_host(setup, looped), None)
    estimator, outer = setup.method(looped.window), setup.outer

    def episode(state, window, draw, rate, resident, keep_phi):
        return loops.run_episode(
            estimator,
            outer,
            problem,
            state,
            window,
            rate,
            draw=draw,
            resident=resident,
            keep_phi=keep_phi,
            loop=looped.episode,
        )

    def w_T(state):  # only the end of an episode of several tasks moves the weights
        if estimator.tasks is None:
            return {}
        return {"params": state.params, "model_state": state.model_state}

    def episodes(state, n, windows, rates, resident):
        def body(k, carry):
            window, rate = jax.tree.map(lambda x: x[k], (windows, rates))
            state = episode(carry[0], window, None, rate, resident, keep_phi=False)
            return core.end_episode(state, tasks=estimator.tasks), w_T(state)

        return lax.fori_loop(0, n, body, (state, w_T(state)))

    return Programs(fit, jax.jit(episode, static_argnames="keep_phi"), jax.jit(episodes))


def _on_host(setup: Setup, looped: Loops) -> Callable[..., BilevelState]:
    """An episode as a Python loop, over updates or over their steps."""
    hosted = setup.method("host")
    if hosted.hosted and hosted.unroll_steps > 1:
        run = _by_steps(setup, hosted)
    else:
        run = _by_updates(setup, setup.method(looped.window))
    if setup.problem.begin is None:
        return run
    recovered = jax.jit(functools.partial(core.recovered, setup.problem))

    def episode(state, *arguments, keep_phi):
        return recovered(state.inner, run(state, *arguments, keep_phi=keep_phi))

    return episode


def _begun(setup: Setup, estimator: Estimator) -> Callable[..., Any]:
    """`-> (s_0, first, windows, origin)`, for `jit`; see `gradhpo.core.episode.cut_episode`."""

    def begin(state, window, draw, resident, keep_phi):
        begun = core.start_episode(estimator, setup.problem, state, draw, keep_phi=keep_phi)
        window, _ = core.episode_data(window, begun.window, resident)
        state = core.finished(begun.state, check_window(window))  # counted at once, in here
        return state, *core.cut_episode(window, estimator), begun.origin

    return begin


def _by_steps(setup: Setup, estimator: Estimator) -> Callable[..., BilevelState]:
    """An update is the host loop of its estimator, over one compiled step forwards and one back."""
    problem = setup.problem

    def cut(windows, i, resident):
        return fetch(resident, jax.tree.map(lambda x: x[i], windows))

    def apply(state, estimate, window, rate):
        outer = as_outer(setup.outer, rate)
        return apply_estimate(estimator, outer, problem, state, estimate, window)

    def update(estimator, state, batches, rate, origin=None):
        with explain_loops():
            estimate = estimator.estimate(
                problem, state.memory, state.inner, state.hyperparams, batches, origin
            )
        return apply(state, estimate, batches, rate)

    begin = jax.jit(_begun(setup, estimator), static_argnames="keep_phi")
    cut, apply = jax.jit(cut), jax.jit(apply)
    led, fetched = delayed(estimator, estimator.lead, loop="host"), jax.jit(_fetched)

    def episode(state, window, draw, rate, resident, keep_phi):
        state, first, windows, origin = begin(state, window, draw, resident, keep_phi=keep_phi)
        if first is not None:
            state = update(led, state, fetched(first, resident), rate)
        for i in range(check_window(windows)):
            state = update(estimator, state, cut(windows, i, resident), rate, origin)
            origin = None  # the first window alone looks back at the start
        return state

    return episode


def _by_updates(setup: Setup, estimator: Estimator) -> Callable[..., BilevelState]:
    """An update is one compiled program."""
    problem, start = setup.problem, _begun(setup, estimator)
    step = bilevel_step(estimator, setup.outer)
    led = bilevel_step(delayed(estimator, estimator.lead, loop="unroll"), setup.outer)

    def begin(state, window, draw, resident, rate, keep_phi):
        state, first, windows, origin = start(state, window, draw, resident, keep_phi)
        if first is not None:
            state = led(problem, state, fetch(resident, first), rate)
        # Buffers of its own, which the updates may donate.
        carry = jax.tree.map(jnp.copy, Packed.of((jnp.zeros((), jnp.int32), state)))
        return carry, windows, origin

    def advance(carry, windows, rate, resident, origin):
        i, state = carry.tree()
        window = fetch(resident, jax.tree.map(lambda x: x[i], windows))
        return Packed.of((i + 1, step(problem, state, window, rate, origin)))

    begin = jax.jit(begin, static_argnames="keep_phi")
    advance = jax.jit(advance, donate_argnums=0)

    def episode(state, window, draw, rate, resident, keep_phi):
        rate = rate if rate is None else jax.device_put(rate)
        carry, windows, origin = begin(state, window, draw, resident, rate, keep_phi=keep_phi)
        for _ in range(check_window(windows)):
            carry = advance(carry, windows, rate, resident, origin)
            origin = None  # the first window alone looks back at the start
        return carry.tree()[1]

    return episode


def _fetched(window, resident):
    return fetch(resident, window)


end_episode = jax.jit(core.end_episode, static_argnames="tasks")
