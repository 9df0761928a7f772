"""Runs of the study: hyperparameters that follow gradients, and plain training."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.declared import Declared, bind, declared
from gradhpo.core.estimator import roll
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import Window
from gradhpo.core.step import init_state
from gradhpo.estimators.reverse import reverse
from gradhpo.studies.mixed.problem import SPACE, Data, loss, problem, start

__all__ = ["CHOICES", "Followed", "decided", "follow", "judged", "spaces_of"]

CHOICES = ("activation", "width")
NEVER = -1e3  # a logit whose softmax is 0, and so is its derivative: what is decided stays so


def spaces_of(data: Data) -> Declared:
    """The spaces of the hyperparameters, a penalty for every pixel of these images."""
    return declared(SPACE, start(jnp.shape(data.train.inputs)[1]))


class Followed(NamedTuple):
    """A run of episodes; arrays over the episodes."""

    stored: Any  # the hyperparameters that the episode was trained with, as they are stored
    val_loss: jax.Array
    last: Any  # those of the next episode


@partial(jax.jit, static_argnums=(0, 1))
def follow(
    T: int, episodes: int, rate: Any, stored: Any, params: Any, data: Data, keys: jax.Array
) -> Followed:
    """Episodes of T steps, all from the same weights, with the same noise; after each the
    hyperparameters follow the exact hypergradient."""
    posed = bind(problem(data.train, data.val), spaces_of(data))
    outer = optax.adam(optax.cosine_decay_schedule(rate, episodes, 0.05))
    state = init_state(posed, reverse(T), outer, params, stored)
    windows = Window(jnp.broadcast_to(keys, (episodes, T)), np.zeros((episodes, T), np.float32))
    state, (moved, val_loss) = run_episodes(
        reverse(T),
        outer,
        posed,
        state,
        windows,
        lr_reptile=0.0,
        observe=lambda state: (state.hyperparams, state.metadata["val_loss"]),
    )
    used = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs[:-1]]), stored, moved)
    return Followed(used, val_loss, state.hyperparams)


def decided(stored: Any, choices: dict[str, jax.Array]) -> Any:
    """What is stored, with choices made, rows of 0 and 1: gradients move the numbers alone."""
    return stored | {name: jnp.where(rows > 0, 0.0, NEVER) for name, rows in choices.items()}


@partial(jax.jit, static_argnums=0)
def judged(
    T: int, lam: Any, params: Any, data: Data, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Validation and test loss after T steps with hyperparameters in natural scale."""
    posed = problem(data.train, data.val)
    w = roll(posed.dynamics, posed.dynamics.init(params, lam), lam, keys).params
    return loss(w, lam, data.val), loss(w, lam, data.test)
