"""One run of one method, timed, with the exact answer at its points."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.episode import in_windows
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import fetch
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.studies.single_loop.entries import ENTRIES, steps_of
from gradhpo.studies.single_loop.problem import (
    Exact,
    Split,
    cut,
    exact,
    logistic,
    train_loss,
    val_loss,
)

__all__ = ["Curve", "train"]


class Curve(NamedTuple):
    """One run, at the start and at every point after."""

    seconds: np.ndarray
    hypergrad_norm: np.ndarray
    value: np.ndarray  # L_val of the weights that are best for lam
    current: np.ndarray  # L_val of the weights that the method has
    last: Exact


def train(
    method: str,
    rates: tuple[float, float],
    data: Split,
    start: Exact,
    *,
    batch_size: int,
    budget: int,
    seed: int,
    points: int,
) -> Curve:
    """One method from weights 0 and lam 0; the clock stops at every point and runs on after it."""
    resident = cut(data, batch_size, seed)
    sizes = [len(side["index"]) for side in resident]
    steps = steps_of(method, budget / points)
    longest = max(steps_of(m, budget / points) for m in ENTRIES) * points
    draws = np.random.default_rng((seed, 1)).integers(0, sizes, (longest, 2), dtype=np.int32)
    zeros = jnp.zeros(data.train.inputs.shape[1])
    rate = tuple(jnp.asarray(r, jnp.float32) for r in rates)

    def segment(state, k):
        part = Window(*jnp.asarray(draws[k * steps : (k + 1) * steps].T))
        return jax.block_until_ready(_segment(method, state, part, resident, rate))

    state = _initial(method, zeros, *sizes)
    if points > 1:  # a curve is wanted, and its times
        segment(state, 0)  # compiles
    found, states, seconds = [start], [state], [0.0]
    for k in range(points):
        begun = time.perf_counter()
        state = segment(state, k)
        seconds.append(seconds[-1] + time.perf_counter() - begun)
        states.append(state)
        found.append(_exact(data, state, found[-1]))
    return Curve(
        np.array(seconds),
        np.array([np.linalg.norm(x.hypergrad) for x in found]),
        np.array([x.value for x in found]),
        np.array([float(logistic(s.params, *data.val)) for s in states]),
        found[-1],
    )


def _problem(inner_rate: Any) -> BilevelProblem:
    return BilevelProblem(from_optax(train_loss, optax.sgd(inner_rate)), val_loss)


def _initial(method: str, zeros: jax.Array, n: int, m: int) -> BilevelState:
    estimator = ENTRIES[method].make(0.1, n, m)
    return init_state(_problem(0.1), estimator, optax.sgd(0.1), zeros, zeros)


@partial(jax.jit, static_argnums=0)
def _segment(
    method: str, state: BilevelState, draws: Window, resident: Window, rates: Any
) -> BilevelState:
    """Some outer updates in a row; the rates are arguments, so one program serves the grid."""
    inner_rate, outer_rate = rates
    estimator = ENTRIES[method].make(inner_rate, *(len(side["index"]) for side in resident))
    step = bilevel_step(estimator, optax.sgd(outer_rate))

    def body(state, window):
        return step(_problem(inner_rate), state, fetch(resident, window)), None

    return lax.scan(body, state, in_windows(draws, estimator.unroll_steps))[0]


def _exact(data: Split, state: BilevelState, before: Exact) -> Exact:
    """The exact answer at lam, or NaN where the run has diverged."""
    lam = np.asarray(state.hyperparams)
    if int(state.metadata["n_rejected"]) or not np.all(np.abs(lam) < 50):
        nan = np.full(len(lam), np.nan)
        return Exact(nan, nan, float("nan"))
    return exact(data, lam, before.weights)
