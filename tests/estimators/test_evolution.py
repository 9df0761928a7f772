"""ES and PES: their formulas, and their means against the exact hypergradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_formulas import at, started, whole_window

from gradhpo import BilevelProblem, ESOptimizer, PESOptimizer, Window, es, from_update, pes, reverse
from gradhpo.core.dynamics import InnerState
from gradhpo.testing import assert_trees_close
from gradhpo.testing.problems import integer_leaves

pytestmark = pytest.mark.usefixtures("x64")
T, K, SIGMA = 20, 5, 0.1
NOISE = np.random.default_rng(1)
MIX = NOISE.standard_normal((4, 2))


def linear_quadratic():
    def step(w, lam, batch):
        return w - 0.1 * (jnp.array([0.5, 1.0, 1.5, 2.0]) * w + MIX @ lam - batch)

    def judge(w, lam, batch):
        return jnp.sum((w - 1) ** 2) / 2 + w @ batch

    problem = BilevelProblem(from_update(step), judge)
    window = Window(*(jnp.asarray(NOISE.standard_normal((T, 4))) for _ in range(2)))
    return problem, InnerState(jnp.ones(4), ()), jnp.array([0.3, -0.2]), window


def over_the_run(estimator, case):
    """The last hypergradient of T / K windows at fixed lam."""
    problem, inner, lam, window = case
    windows = jax.tree.map(lambda x: x.reshape(T // K, K, *x.shape[1:]), window)
    memory = estimator.init(inner, lam, None)
    for k in range(T // K):
        got = estimator.estimate(problem, memory, inner, lam, at(windows, k))
        memory, inner = got.memory, got.inner
    return got


def mean_and_error(make, case, repeats=200):
    """Mean and standard error over independent seeds, vectorised."""

    def one(key):
        estimator = make
        problem, inner, lam, window = case
        memory = estimator.init(inner, lam, None)._replace(key=key)
        steps = estimator.unroll_steps
        windows = jax.tree.map(lambda x: x.reshape(T // steps, steps, *x.shape[1:]), window)
        for k in range(T // steps):
            got = estimator.estimate(problem, memory, inner, lam, at(windows, k))
            memory, inner = got.memory, got.inner
        return got.hypergrad

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), repeats))
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(repeats)


def test_means_are_exact_where_they_should_be():
    """ES over the whole run and PES in windows of 5; ES in windows of 5 is truncated."""
    case = linear_quadratic()
    exact = whole_window(reverse(T), *case).hypergrad
    for estimator in (es(T, sigma=SIGMA, pairs=50), pes(K, sigma=SIGMA, pairs=50)):
        mean, error = mean_and_error(estimator, case)
        assert np.all(abs(mean - exact) < 4 * error), (mean, exact, error)
        assert np.all(error < 0.2 * abs(exact))
    mean, error = mean_and_error(es(K, sigma=SIGMA, pairs=50), case)
    assert np.all(abs(mean - exact) > 10 * error)


def test_es_is_its_formula():
    case = problem, inner, lam, window = linear_quadratic()
    estimator = es(T, sigma=SIGMA, pairs=3, seed=4)
    got = whole_window(estimator, *case)
    key = jax.random.split(jax.random.fold_in(jax.random.key(4), 0), 1)[0]
    eps = SIGMA * jax.random.normal(key, (3, 2))

    def F(lam):
        w = inner.params
        for t in range(T):
            w = problem.dynamics.step(InnerState(w, ()), lam, window.train[t]).params
        return problem.outer_loss(w, lam, window.val[-1])

    want = sum(e * (F(lam + e) - F(lam - e)) / (2 * SIGMA**2) for e in eps) / 3
    assert_trees_close(got.hypergrad, want, 1e-10)
    np.testing.assert_allclose(got.info["val_loss"], F(lam), rtol=1e-13)
    other = estimator.estimate(problem, got.memory, inner, lam, window).hypergrad
    assert np.all(other != got.hypergrad)  # drawn anew


def test_pes_keeps_the_sum_of_its_perturbations():
    """Windows of the formula by hand: xi accumulates, both states of a particle go on."""
    case = problem, inner, lam, window = linear_quadratic()
    got = over_the_run(pes(K, sigma=SIGMA, pairs=2, seed=3), case)
    w = {i: (inner.params, inner.params) for i in range(2)}
    xi = jnp.zeros((2, 2))
    for k in range(T // K):
        key = jax.random.split(jax.random.fold_in(jax.random.key(3), k), 1)[0]
        eps = SIGMA * jax.random.normal(key, (2, 2))
        xi, want = xi + eps, 0.0
        for i in range(2):
            ends = []
            for sign, s in zip((1, -1), w[i], strict=True):
                for t in range(k * K, (k + 1) * K):
                    s = problem.dynamics.step(
                        InnerState(s, ()), lam + sign * eps[i], window.train[t]
                    ).params
                ends.append(s)
            plus, minus = (problem.outer_loss(s, lam, window.val[(k + 1) * K - 1]) for s in ends)
            w[i] = tuple(ends)
            want = want + xi[i] * (plus - minus) / (2 * SIGMA**2) / 2
    assert_trees_close(got.hypergrad, want, 1e-10)
    assert_trees_close(got.memory.xi, xi, 1e-14)


def test_an_episode_starts_the_particles_anew_and_goes_on_drawing():
    case = problem, inner, lam, _ = linear_quadratic()
    estimator = pes(K, pairs=2)
    memory = over_the_run(estimator, case).memory
    fresh = estimator.reset(memory, inner, lam)
    assert not np.any(fresh.xi) and int(fresh.draws) == T // K
    assert_trees_close(fresh.plus.params, jnp.broadcast_to(inner.params, (2, 4)), 0)


@pytest.mark.parametrize("make", [es, pes])
def test_integer_leaves_and_structure(make):
    problem, inner, lam, window = started(integer_leaves, 4)
    estimator = make(4, pairs=2)
    memory = estimator.init(inner, lam, None)
    got = estimator.estimate(problem, memory, inner, lam, window)
    assert jax.tree.structure(got.memory) == jax.tree.structure(memory)
    assert int(got.inner.params["visits"]) == 4
    assert jax.tree.map(jnp.shape, got.hypergrad) == jax.tree.map(jnp.shape, lam)


def test_a_loss_without_a_derivative():
    """Accuracy: zero gradient everywhere, and still something to follow."""

    def judge(w, lam, batch):
        return jnp.mean(jnp.where(w * batch > 0, 0.0, 1.0))

    opt = ESOptimizer(
        update_fn=lambda w, lam, batch: w + 0.5 * (lam - w),
        outer_optimizer=optax.sgd(0.5),
        T=4,
        sigma=0.3,
        pairs=64,
    )
    state = opt.run(
        opt.init(jnp.zeros(5), jnp.full(5, -0.3)),
        M=40,
        get_train_batch=lambda: np.ones(5),
        get_val_batch=lambda: np.ones(5),
        train_loss_fn=judge,
        val_loss_fn=judge,
    )
    assert judge(state.params, None, jnp.ones(5)) == 0
    assert np.all(np.asarray(state.hyperparams) > 0)


@pytest.mark.parametrize(
    "cls, settings, message",
    [
        (ESOptimizer, {}, "ESOptimizer needs T="),
        (ESOptimizer, {"T": 2, "sigma": 0.0}, "sigma must be positive"),
        (PESOptimizer, {"pairs": 0}, "pairs must be at least 1"),
        (PESOptimizer, {"unroll_steps": 0}, "unroll_steps.* must be at least 1"),
    ],
)
def test_settings_are_checked(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(update_fn=lambda w, lam, batch: w, **settings)
