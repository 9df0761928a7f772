"""MAML, FOMAML, Reptile and Meta-SGD against `jax.grad` of their formulas, written out here.

The training of a task is that of Finn et al.'s own code (`task_metalearn`): steps of gradient
descent on the same support points, the loss of the last weights on the query points, and a mean
over the tasks of a meta-batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Task,
    discounted_sum,
    from_optax,
    one_step,
    over_tasks,
    reverse,
    tune,
)
from gradhpo.meta import Sinusoids, carried, learned
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.transforms import scale_by_tree

pytestmark = pytest.mark.usefixtures("x64")
TASKS, STEPS, RATE, OUTER_RATE = 3, 3, 0.05, 0.1
KEYS = jax.random.split(jax.random.key(5), 2 * TASKS).reshape(2, TASKS)  # two meta-batches
OUTER = optax.sgd(OUTER_RATE)
SAMPLE = Sinusoids(STEPS, shots=5, queries=6, fresh=False)


def loss(w, lam, batch):
    del lam
    x, y = batch
    return jnp.mean((jnp.tanh(x[:, None] * w["a"] + w["b"]) @ w["c"] - y) ** 2)


def weights():
    draw = np.random.default_rng(0).standard_normal
    return {"a": draw(6), "b": draw(6), "c": draw(6)}


# -- the formulas ---------------------------------------------------------------------------


def adapted(w, key, rates, momentum=0.0):
    support = jax.tree.map(lambda x: x[0], SAMPLE(key).train)
    velocity = jax.tree.map(jnp.zeros_like, w)
    for _ in range(STEPS):
        slope = jax.grad(loss)(w, None, support)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, slope)
        w = jax.tree.map(lambda w, rate, v: w - rate * v, w, rates, velocity)
    return w


def query(w, key):
    return loss(w, None, jax.tree.map(lambda x: x[0], SAMPLE(key).val))


def equal_rates(w):
    return jax.tree.map(lambda x: jnp.full_like(x, RATE), w)


def maml(w, keys, momentum):
    def after(w):
        return jnp.mean(jax.vmap(lambda key: query(ends(w, key, momentum), key))(keys))

    return jax.grad(after)(w)


def fomaml(w, keys, momentum):
    """The derivative of training is replaced by the identity."""
    slopes = jax.vmap(lambda key: jax.grad(query)(ends(w, key, momentum), key))(keys)
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), slopes)


def ends(w, key, momentum):
    return adapted(w, key, jax.tree.map(lambda x: jnp.full_like(x, RATE), w), momentum)


def descended(gradient, lam):
    """Plain gradient descent over the two meta-batches."""
    gradient = jax.jit(gradient)
    for keys in KEYS:
        lam = jax.tree.map(lambda x, g: x - OUTER_RATE * g, lam, gradient(lam, keys))
    return lam


# -- the library ----------------------------------------------------------------------------


def run(estimator, make_optimizer, begin, lam, outer=OUTER, lr_reptile=0.0):
    problem = BilevelProblem(from_optax(loss, make_optimizer), loss, begin=begin)
    drawn = iter(KEYS.reshape(-1))
    return tune(
        Task(problem, weights(), lam),
        over_tasks(estimator, TASKS),
        outer,
        episodes=2,
        get_task=lambda: next(drawn),
        lr_reptile=lr_reptile,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "estimator, formula, other",
    [(reverse(STEPS), maml, fomaml), (discounted_sum(1.0, STEPS), fomaml, maml)],
    ids=["maml", "fomaml"],
)
def test_initial_weights(estimator, formula, other, momentum):
    state = run(estimator, optax.sgd(RATE, momentum), learned(SAMPLE), weights())
    want, wrong = (
        descended(lambda w, keys: f(w, keys, momentum), weights())  # noqa: B023
        for f in (formula, other)
    )
    assert_trees_close(state.hyperparams, want, 1e-10)
    assert relative_error(state.hyperparams, wrong) > 1e-4


@pytest.mark.parametrize("rate, momentum", [(1.0, 0.9), (0.3, 0.0), (0.3, 0.9)])
def test_reptile(rate, momentum):
    """`phi + rate * (mean of w_T - phi)`; momentum starts anew in every task."""

    def make_optimizer(lam):
        return optax.sgd(lam, momentum)

    still = optax.set_to_zero()
    state = run(one_step(), make_optimizer, carried(SAMPLE), RATE, still, rate)

    @jax.jit
    def moved(phi, keys):
        after = jax.vmap(lambda key: ends(phi, key, momentum))(keys)
        return jax.tree.map(lambda x, w: x + rate * (jnp.mean(w, axis=0) - x), phi, after)

    phi = moved(moved(weights(), KEYS[0]), KEYS[1])
    everywhere = jax.tree.map(lambda x: jnp.broadcast_to(x, (TASKS, *x.shape)), phi)
    assert_trees_close(state.params, everywhere, 1e-10)


def test_meta_sgd():
    """Li et al. (2017), equations 2 and 3: initial weights, and a rate of either sign for each."""

    def make_optimizer(lam):
        return optax.chain(scale_by_tree(lam["rates"]), optax.scale(-1.0))

    rates = jax.tree.map(lambda x: RATE * np.where(x > -1, 1.0, -0.1), weights())
    assert min(np.min(x) for x in jax.tree.leaves(rates)) < 0
    lam = {"initial": weights(), "rates": rates}
    begin = learned(SAMPLE, lambda lam: lam["initial"])
    state = run(reverse(STEPS), make_optimizer, begin, lam)

    def after(lam, keys):
        trained = jax.vmap(lambda key: adapted(lam["initial"], key, lam["rates"]))(keys)
        return jnp.mean(jax.vmap(query)(trained, keys))

    assert_trees_close(state.hyperparams, descended(jax.grad(after), lam), 1e-10)
