"""Meta-training of all seeds by one method, as one compiled program."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.estimator import Cost, Estimator
from gradhpo.core.loop import run_episodes
from gradhpo.core.step import init_state
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.studies.sinusoid.problem import TASKS, Drawn, judge, problem
from gradhpo.studies.sinusoid.settings import METHODS, Setting

__all__ = ["Numbers", "Outcome", "cost", "numbers", "train"]

PERIOD = 50  # episodes between two fits of theta


class Outcome(NamedTuple):
    """Of every seed; NaN where a method has no theta."""

    test_mse: Any  # (seeds, M), after every episode
    theta: Any  # the one that is used, (seeds, M)
    theta_fit: Any  # the last fitted one
    theta_r2: Any  # of that fit
    counts: Any  # of every status, (seeds, codes)


class Numbers(NamedTuple):
    """The part of a setting that a program takes as arguments."""

    gamma: Any
    theta: Any  # None: fitted
    outer_rate: Any
    momentum: Any


def numbers(setting: Setting) -> Numbers:
    return Numbers(setting.gamma, setting.theta, setting.outer_rate, setting.momentum)


def train(name: str, setting: Setting, drawn: Drawn) -> Outcome:
    """One seed after another: on two cores that is faster than all at once.

    Settings that differ in numbers alone share a program.
    """
    given = numbers(setting)
    static = replace(setting, episodes=0, seeds=0, fresh=True, methods=())
    static = replace(static, gamma=0.0, outer_rate=0.0, momentum=0.0)
    static = replace(static, theta=None if given.theta is None else 0.0)
    return _program(name, static)(drawn, given)


@functools.lru_cache(maxsize=64)
def _program(name: str, static: Setting) -> Any:
    return jax.jit(
        lambda drawn, given: lax.map(functools.partial(_seed, name, static, given), drawn)
    )


def _seed(name: str, static: Setting, given: Numbers, drawn: Drawn) -> Outcome:
    method = over_tasks(METHODS[name](static, given.gamma, given.theta), TASKS)
    adam, task = optax.adam(given.outer_rate), problem(given.momentum)
    window = jax.tree.map(lambda x: jnp.swapaxes(x[0], 0, 1), drawn.tasks)
    state = init_state(task, method, adam, drawn.head, drawn.body, window)

    def observe(state):
        phi = jax.tree.map(lambda w: jnp.mean(w, axis=0), state.params)  # Reptile at rate 1
        tested = judge(phi, state.hyperparams, drawn.tests, static.steps, given.momentum)
        unknown = jnp.full(TASKS, jnp.nan)
        fit = (state.get_metric(key, unknown) for key in ("theta", "theta_fit", "theta_r2"))
        return [tested, *(x[0] for x in fit)]  # one theta for all tasks

    state, (test_mse, theta, fit, r2) = run_episodes(
        method,
        adam,
        task,
        state,
        None,
        draws=drawn.tasks,
        estimation_period=PERIOD,
        observe=observe,
    )
    return Outcome(test_mse, theta, fit, r2, state.counts)


def cost(name: str, setting: Setting, size: int) -> Cost:
    """Of a seed's whole run."""
    method: Estimator = METHODS[name](setting, setting.gamma, setting.theta)
    return over_tasks(method, TASKS).cost(
        setting.steps, size, episodes=setting.episodes, period=PERIOD
    )
