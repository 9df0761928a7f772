"""The virtual step: the derivative is that of the lookahead, training goes on as without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    InOrder,
    OneStepOptimizer,
    Task,
    Window,
    from_optax,
    from_update,
    greedy,
    hyperdistill,
    init_state,
    one_step,
    over_tasks,
    run_episode,
    tune,
    update_every,
    virtual_step,
)
from gradhpo.testing import assert_trees_close, relative_error

pytestmark = pytest.mark.usefixtures("x64")
T, RATE, MOMENTUM = 4, 0.05, 0.9
FAR = optax.sgd(RATE / (1 - MOMENTUM))


def train_loss(w, lam, batch):
    x, y = batch
    return jnp.mean(jax.nn.sigmoid(lam) * (jnp.tanh(x @ w) - y) ** 2)


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


PROBLEM = BilevelProblem(from_optax(train_loss, optax.sgd(RATE, MOMENTUM)), val_loss)
x = np.random.default_rng(0).standard_normal((2, T, 5, 3))
WINDOW = Window(*((side, np.sin(side.sum(-1))) for side in x))
PARAMS, LAM = np.array([0.4, -0.2, 0.1]), np.zeros(5)


def in_the_middle():
    inner = PROBLEM.dynamics.init(jnp.asarray(PARAMS), jnp.asarray(LAM))
    for t in range(2):
        inner = PROBLEM.dynamics.step(inner, LAM, at(t).train)
    return inner


def at(t):
    return jax.tree.map(lambda x: jnp.asarray(x[t]), WINDOW)


def stacked(*steps):
    return jax.tree.map(lambda *x: jnp.stack(x), *(at(t) for t in steps))


def test_it_is_the_gradient_of_the_step_written_out():
    inner = in_the_middle()

    def after(lam):
        g = jax.grad(train_loss)(inner.params, lam, at(2).train)
        return val_loss(inner.params - RATE / (1 - MOMENTUM) * g, lam, at(2).val)

    method = virtual_step(one_step(), FAR)
    got = method.estimate(PROBLEM, (), inner, jnp.asarray(LAM), stacked(2))
    value, h = jax.value_and_grad(after)(jnp.asarray(LAM))
    assert_trees_close(got.hypergrad, h, 1e-12)
    assert_trees_close(got.info["val_loss"], value, 1e-12)
    assert_trees_close(got.inner, PROBLEM.dynamics.step(inner, LAM, at(2).train), 1e-14)
    plain = one_step().estimate(PROBLEM, (), inner, jnp.asarray(LAM), stacked(2))
    assert relative_error(got.hypergrad, plain.hypergrad) > 0.5


def test_the_optimizer_itself_changes_nothing_without_momentum():
    """Plain SGD in both places: every method is what it was."""
    problem = PROBLEM._replace(dynamics=from_optax(train_loss, optax.sgd(RATE)))
    for method in (one_step(), one_step(0.9), hyperdistill(0.8), greedy(0.9, 2)):
        ends = []
        for each in (method, virtual_step(method, optax.sgd(RATE))):
            outer = optax.sgd(0.1)
            state = init_state(problem, each, outer, PARAMS, LAM, WINDOW)
            ends.append(run_episode(each, outer, problem, state, WINDOW))
        assert_trees_close(ends[1].hyperparams, ends[0].hyperparams, 1e-12)
        assert_trees_close(ends[1].params, ends[0].params, 1e-12)


def test_theta_is_fitted_to_virtual_training():
    memories = []
    for rate, virtual in ((optax.sgd(RATE, MOMENTUM), FAR), (FAR, None)):
        problem = PROBLEM._replace(dynamics=from_optax(train_loss, rate))
        method = hyperdistill(0.8) if virtual is None else virtual_step(hyperdistill(0.8), virtual)
        inner = problem.dynamics.init(jnp.asarray(PARAMS), jnp.asarray(LAM))
        memory = method.init(inner, jnp.asarray(LAM), WINDOW)
        assert method.start is not None
        memories.append(method.start(problem, memory, inner, jnp.asarray(LAM), WINDOW))
    assert_trees_close(memories[0].theta, memories[1].theta, 1e-12)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_with_delays_tasks_and_every_loop(loop):
    def make(loop):
        return update_every(virtual_step(hyperdistill(0.8), FAR, loop=loop), 2, loop=loop)

    task = Task(PROBLEM, PARAMS, LAM, InOrder(WINDOW.train), InOrder(WINDOW.val))
    state = tune(task, make, optax.sgd(0.1), episodes=1, T=T, loop=loop)
    assert int(state.step) == 2
    method = over_tasks(make("scan"), 2)
    outer = optax.sgd(0.1)
    two = jax.tree.map(lambda x: np.stack([x, x], axis=1), WINDOW)
    both = init_state(PROBLEM, method, outer, PARAMS, LAM, two)
    window = two
    assert method.start is not None
    both = both.update(memory=method.start(PROBLEM, both.memory, both.inner, LAM, window))
    both = run_episode(method, outer, PROBLEM, both, window)
    assert_trees_close(both.hyperparams, state.hyperparams, 1e-12)


def test_classes_take_it_and_refuse_what_does_not_fit():
    tuner = OneStepOptimizer(
        inner_optimizer=optax.sgd(RATE, MOMENTUM), virtual=FAR, outer_optimizer=optax.sgd(0.1)
    )
    state = tuner.init(PARAMS, LAM)
    h = tuner.compute_hypergradient(state, at(0).train, at(0).val, train_loss, val_loss)
    inner = PROBLEM.dynamics.init(jnp.asarray(PARAMS), jnp.asarray(LAM))
    got = virtual_step(one_step(), FAR).estimate(PROBLEM, (), inner, jnp.asarray(LAM), stacked(0))
    assert_trees_close(h, got.hypergrad, 1e-12)
    with pytest.raises(ValueError, match="virtual= is another optimizer"):
        OneStepOptimizer(update_fn=lambda w, lam, batch: w, virtual=FAR)
    with pytest.raises(TypeError, match="virtual must be"):
        OneStepOptimizer(inner_optimizer=optax.sgd(0.1), virtual=0.1)
    opaque = BilevelProblem(from_update(lambda w, lam, batch: w), val_loss)
    with pytest.raises(ValueError, match="opaque update_fn"):
        virtual_step(one_step(), FAR).estimate(opaque, (), inner, jnp.asarray(LAM), stacked(0))
