"""SGD with momentum in the form that runs backwards exactly.

Maclaurin et al. (2015), algorithm 1:

    v_{t+1} = mu_t v_t - (1 - mu_t) g_t
    w_{t+1} = w_t + eta_t v_{t+1}

(The paper prints `v_t` in the second line; its program, and the derivatives it prints, use the
new velocity.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradhpo.core.types import Params
from gradhpo.utils.exact_arithmetic import quantize
from gradhpo.utils.gradients import tree_broadcast
from gradhpo.utils.schedules import Rate, value_at

__all__ = ["Reversible", "ReversibleState", "reversible_sgd"]


class ReversibleState(NamedTuple):
    """Slots of `reversible_sgd`."""

    step: jax.Array  # t, int32
    velocity: Params  # v_t


class Reversible(NamedTuple):
    """A `GradientTransformation` that shows its rates: what it takes to run it backwards."""

    init: Callable[[Params], ReversibleState]
    update: Callable[..., tuple[Params, ReversibleState]]
    last_updates: Callable[[ReversibleState], Params]  # U_t from the slots after step t
    learning_rate: Rate  # eta
    momentum: Rate  # mu


def reversible_sgd(learning_rate: Rate, momentum: Rate) -> Reversible:
    """SGD with momentum whose training runs `gradhpo.reversible` can reverse.

    The step of `optax.sgd(learning_rate * (1 - momentum), momentum)`, for constant rates.

    Args:
        learning_rate: eta: a number; a tree that is a prefix of the parameters (a number per
            group) or like them (one per parameter); or a function of the count of
            steps that returns either, as Optax's schedules are. May be traced.
        momentum: mu, likewise, strictly between 0 and 1. It is rounded to a multiple of
            2^-16, wherever it stands; the derivative ignores the rounding.

    Raises:
        ValueError: a momentum that is known when this is called is not between 0 and 1. One
            that is traced is checked when it is used: see `Status.OUT_OF_RANGE`.

    >>> step = reversible_sgd(0.5, momentum=0.75)
    >>> updates, state = step.update(jnp.array(1.0), step.init(jnp.array(0.0)))
    >>> print(updates, state.velocity)
    -0.125 -0.25
    """
    if not callable(momentum):
        for leaf in jax.tree.leaves(momentum):
            if not isinstance(leaf, Tracer):
                known = np.asarray(leaf)
                if not np.all((known > 0) & (known < 1)):
                    raise ValueError(f"momentum must lie strictly between 0 and 1, got {known}.")

    def init(params):
        return ReversibleState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        mu = tree_broadcast(value_at(momentum, state.step), updates)

        def accelerate(mu, v, g):
            mu = quantize(mu)
            return (mu * v - (1 - mu) * g).astype(v.dtype)

        velocity = jax.tree.map(accelerate, mu, state.velocity, updates)
        state = ReversibleState(state.step + 1, velocity)
        return last_updates(state), state

    def last_updates(state):
        eta = tree_broadcast(value_at(learning_rate, state.step - 1), state.velocity)
        return jax.tree.map(lambda eta, v: (eta * v).astype(v.dtype), eta, state.velocity)

    return Reversible(init, update, last_updates, learning_rate, momentum)
