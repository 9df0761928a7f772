"""Spaces, projections and top-k belong to the outer update: they go with every method."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import BilevelProblem, Task, from_optax, spaces, tune
from gradhpo.algorithms import METHODS
from gradhpo.transforms import on_simplex, proximal_adam, top_k

X = 0.2 * np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
Y = X @ np.array([1.0, -1.0, 0.5, 0.0], np.float32)
K = 2


def train_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + lam["weights"] @ w**2 + lam["decay"] * jnp.sum(w**2)


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 1e-3 * (lam["decay"] + jnp.sum(lam["weights"] ** 2))


def task():
    return Task(
        BilevelProblem(from_optax(train_loss, optax.sgd(0.1)), val_loss, train_loss),
        np.zeros(4, np.float32),
        {"weights": np.full(4, 0.25, np.float32), "decay": np.float32(0.3)},
        train=lambda: (X[0], Y[0]),
        val=lambda: (X[1], Y[1]),
        space={"weights": spaces.simplex(by="projection"), "decay": spaces.log()},
    )


# Reversible training has an optimizer of its own; FDS needs an entry for every piece of a run.
FIT = [name for name in METHODS if name not in ("reversible", "fds")]


@pytest.mark.filterwarnings("ignore:.*LINEAR_SOLVE_INACCURATE")  # of the identity for H^-1
@pytest.mark.parametrize("name", FIT)
def test_every_method_keeps_within_and_moves_the_chosen(name):
    method, posed = METHODS[name].tried(), task()
    T = 2 * method.unroll_steps + (method.lead or 0)
    before = posed.stored.hyperparams
    state = tune(
        posed,
        method,
        top_k(proximal_adam(0.05, {"weights": on_simplex(), "decay": None}), K),
        episodes=1,
        T=T,
    )
    values = posed.values(state.hyperparams)
    assert float(values["weights"].sum()) == pytest.approx(1, abs=1e-5)
    assert values["weights"].min() >= 0 and values["decay"] > 0
    moved = sum(int(np.sum(state.hyperparams[leaf] != before[leaf])) for leaf in before)
    assert 0 < moved
    assert np.isfinite(float(state.metadata["outer_stationarity"]))
