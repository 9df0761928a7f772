"""Data that stay on the device, from which the start of an episode picks rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Picked,
    Pool,
    Resident,
    Start,
    Task,
    Window,
    from_optax,
    hyperdistill,
    one_step,
    over_tasks,
    tune,
)
from gradhpo.meta import adapt
from gradhpo.testing import assert_trees_close

T, N = 4, 3
IMAGES = np.random.default_rng(0).integers(0, 255, (50, 2, 2)).astype(np.uint8)
PARAMS, LAM = np.zeros(4, np.float32), np.float32(0.5)


def loss(w, lam, batch):
    images, target = batch
    pixels = images.reshape(len(images), -1).astype(jnp.float32) / 255
    return jnp.mean((pixels @ w - lam * target) ** 2)


def rows(key):
    for_train, for_val = jax.random.split(key)
    return [
        Picked(jax.random.randint(k, (T, 5), 0, 50), jnp.arange(T * 5.0).reshape(T, 5))
        for k in (for_train, for_val)
    ]


def picking(params, lam, key):
    return Start(params, Window(*rows(key)))


def gathering(params, lam, key):
    sides = ((jnp.asarray(IMAGES)[side.rows], side.beside) for side in rows(key))
    return Start(params, Window(*sides))


def problem(begin):
    return BilevelProblem(from_optax(loss, optax.sgd(0.01)), loss, begin=begin)


@pytest.mark.parametrize("method", [one_step(), hyperdistill(0.9), over_tasks(one_step(), N)])
@pytest.mark.parametrize("loop", ["scan", "host"])
def test_rows_of_a_pool_are_the_batches_they_name(method, loop):
    pool = Pool(IMAGES)
    tasks = (
        Task(problem(picking), PARAMS, LAM, pool, pool),
        Task(problem(gathering), PARAMS, LAM),
    )
    states = [tune(t, method, optax.sgd(0.1), episodes=2, loop=loop) for t in tasks]
    assert_trees_close(states[0].hyperparams, states[1].hyperparams, 1e-6)
    assert_trees_close(states[0].params, states[1].params, 1e-6)
    assert abs(float(states[0].hyperparams - LAM)) > 1e-3


def test_a_task_shows_the_batches():
    pool = Pool(IMAGES)
    _, window = Task(problem(picking), PARAMS, LAM, pool, pool).begin(T, jax.random.key(3))
    _, same = Task(problem(gathering), PARAMS, LAM).begin(T, jax.random.key(3))
    assert_trees_close(window, same, 0)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_a_new_task_is_learned_from_rows_too(loop):
    key, images = jax.random.key(3), Pool(IMAGES).data
    learned, picked = adapt(problem(picking), PARAMS, LAM, key, data=images, loop=loop)
    same, _ = adapt(problem(gathering), PARAMS, LAM, key, loop=loop)
    assert_trees_close(learned.params, same.params, 1e-6)
    assert picked.val.rows.shape == (T, 5)


def test_a_pool_alone_is_not_enough():
    pool = Pool(IMAGES)
    with pytest.raises(ValueError, match="waits for the rows that begin picks"):
        Task(problem(None), PARAMS, LAM, pool, pool)
    with pytest.raises(ValueError, match="waits for the rows that begin picks"):
        Task(problem(picking), PARAMS, LAM, pool, Resident(IMAGES, 2))
    with pytest.raises(ValueError, match="no sources"):
        Task(problem(picking), PARAMS, LAM, pool, pool).window(T)
    with pytest.raises(ValueError, match="share a leading axis"):
        Pool((IMAGES, np.zeros(3)))
