"""A `Resident` without a batch size: all of the set at every step, by every kind of method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facade_cases import T, method, run, sgd, start, train_loss, val_loss

from gradhpo import BilevelProblem, Resident, Task, from_optax, one_step, over_tasks, tune
from gradhpo.core.source import Whole, draw, fetch, gather, resident
from gradhpo.tuning.judging import judged
from gradhpo.tuning.training import Length, left_alone

DATA = np.random.default_rng(0).standard_normal((7, 2)).astype(np.float32)
WHOLE = Resident(DATA)
PROBLEM = BilevelProblem(from_optax(train_loss, sgd), val_loss)
KINDS = ("one_step", "greedy", "reverse", "hyperdistill")


def close(a, b, rtol):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol)


@pytest.mark.parametrize("name, loop", [*((name, "scan") for name in KINDS), ("reverse", "host")])
def test_it_is_the_function_that_returns_the_set(name, loop):
    opt = method(name, loop=loop)
    state = opt.init(*start())
    got = run(opt, state, get_val_batch=WHOLE)
    want = run(opt, state, get_val_batch=lambda: DATA)
    close((got.params, got.hyperparams), (want.params, want.hyperparams), rtol=1e-5)
    assert not np.array_equal(got.hyperparams["rate"], run(opt, state).hyperparams["rate"])


def test_both_sides_in_float64(x64):
    wide = DATA.astype(np.float64)
    task = Task(PROBLEM, *start(jnp.float64), WHOLE, WHOLE)
    states = [
        tune(task.replace(train=side, val=side), one_step(), episodes=2, T=T, lr_hyper=0.1)
        for side in (Resident(wide), lambda: wide)
    ]
    assert states[0].hyperparams["rate"].dtype == jnp.float64
    close(*((state.params, state.hyperparams) for state in states), rtol=1e-13)


def test_with_several_tasks_the_first_axis_is_theirs():
    data = np.stack([DATA, 2 * DATA])
    task = Task(PROBLEM, *start(), WHOLE, WHOLE)
    estimator = over_tasks(one_step(), 2)
    states = [
        tune(task.replace(train=side, val=side), estimator, episodes=2, T=T, lr_hyper=0.1)
        for side in (Resident(data), lambda: data)
    ]
    close(*((state.params, state.hyperparams) for state in states), rtol=1e-5)


def test_nothing_of_the_set_is_in_what_is_drawn():
    window = draw(WHOLE, Resident(DATA, 3), 40, 5)
    assert isinstance(window.train, Whole) and window.train.of.nbytes == 5
    batches = fetch(resident(WHOLE, WHOLE), window._replace(val=window.train))
    np.testing.assert_array_equal(batches.train, np.stack([DATA] * 5))
    np.testing.assert_array_equal(gather(DATA, jnp.asarray(WHOLE.indices(0, 2))), [DATA, DATA])
    assert WHOLE.batch_size == 7


def test_the_last_word_is_on_the_set_at_once():
    """A trained task is judged by validation batches of the size it was tuned by."""
    sizes = []

    def loss(w, lam, batch):
        sizes.append(len(batch))
        return jnp.mean((w["w"] - batch) ** 2)

    task = Task(BilevelProblem(from_optax(train_loss, sgd), loss), *start(), WHOLE, WHOLE)
    trial = left_alone(task, Length(2, T))
    found = judged(trial)["val_loss"]
    np.testing.assert_allclose(found, np.mean((trial.state.params["w"] - DATA) ** 2), rtol=1e-6)
    assert set(sizes) == {7}
