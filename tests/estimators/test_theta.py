"""HyperDistill's LinearEstimation: theta by its definition, its limits, its guard."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_formulas import Dense, episode, equal_batches, started, without_slots

from gradhpo import (
    BilevelProblem,
    Status,
    Window,
    bilevel_step,
    from_update,
    hyperdistill,
    init_state,
    over_tasks,
)
from gradhpo.testing import assert_trees_close, unrolled_loss
from gradhpo.testing.problems import (
    CONTRACTION_GAMMA,
    contraction,
    contraction_nonlinear,
    mlp_momentum,
    outer_lam,
)

pytestmark = pytest.mark.usefixtures("x64")


def fitted(case, gamma, **settings):
    problem, inner, lam, window = case
    estimator = hyperdistill(gamma, **settings)
    memory = estimator.init(inner, lam, window)
    return jax.jit(partial(estimator.start, problem))(memory, inner, lam, window)


@pytest.mark.parametrize("problem_at", [contraction, contraction_nonlinear])
def test_theta_is_one_on_the_contraction(problem_at):
    """theta = 1, and then the hypergradient is that of full reverse mode, for any outer loss."""
    case = problem, inner, lam, window = started(problem_at, 6)
    memory = fitted(case, CONTRACTION_GAMMA)
    np.testing.assert_allclose(memory.theta, 1.0, rtol=1e-10)
    np.testing.assert_allclose(memory.theta_r2, 1.0, rtol=1e-10)
    np.testing.assert_allclose(memory.theta_cosine, 1.0, rtol=1e-10)
    got = episode(hyperdistill(CONTRACTION_GAMMA), problem, memory, inner, lam, window)[-1]
    exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)
    assert_trees_close(got.hypergrad, exact, 1e-10)
    assert abs(float(fitted(case, 0.5).theta) - 1) > 1e-2  # another gamma needs another theta


@pytest.mark.parametrize("points", ["line", "trajectory"])
@pytest.mark.parametrize("make", [equal_batches, without_slots], ids=["equal", "no slots"])
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_theta_by_its_definition(points, make, gamma):
    """Algorithm 4 with normalised v, and the form without any division, are one number."""
    case = make(outer_lam, 4)
    dense = Dense.of(*case)
    want = dense.linear_estimation(gamma, points, normalised=True)
    np.testing.assert_allclose(
        dense.linear_estimation(gamma, points, normalised=False), want, rtol=1e-12
    )
    memory = fitted(case, gamma, points=points, theta_guard=False)
    np.testing.assert_allclose(memory.theta, want, rtol=1e-10)
    np.testing.assert_allclose(memory.theta_fit, want, rtol=1e-10)


def test_the_points_averaged_matter():
    """Eq. (17) as printed is another theta than the line of constant memory."""
    case = equal_batches(outer_lam, 4)
    line = float(fitted(case, 0.8, theta_guard=False).theta)
    trajectory = float(fitted(case, 0.8, points="trajectory", theta_guard=False).theta)
    assert abs(line - trajectory) > 1e-4 * abs(line)


def test_one_step_has_theta_one():
    np.testing.assert_allclose(fitted(started(mlp_momentum, 1), 0.7).theta, 1.0, rtol=1e-12)


def test_a_theta_that_is_not_positive_is_refused():
    """The one before is kept and the status says so; the guard can be switched off."""
    dynamics = from_update(lambda w, lam, batch: -3.0 * w + lam)  # A = -3: terms alternate
    problem = BilevelProblem(dynamics, lambda w, lam, batch: w + batch)
    lam = jnp.array(0.5)
    inner, window = dynamics.init(jnp.array(1.0), lam), Window(jnp.zeros((2, 3)), jnp.zeros(2))
    # s = 1: x = 1, y = 1. s = 2: x = S_2 = 2, y = 1 - 3. theta = (1 - 4) / (1 + 4).
    case = problem, inner, lam, window
    guarded = fitted(case, 1.0)
    np.testing.assert_allclose(guarded.theta, 1.0)
    np.testing.assert_allclose(guarded.theta_fit, -0.6, rtol=1e-12)
    assert guarded.status == Status.THETA_REJECTED
    free = fitted(case, 1.0, theta_guard=False)
    np.testing.assert_allclose(free.theta, -0.6, rtol=1e-12)
    assert free.status == Status.OK
    step = bilevel_step(hyperdistill(1.0))
    state = init_state(problem, hyperdistill(1.0), None, inner.params, lam, window)
    state = state.update(memory=guarded)
    after = step(problem, state, Window(jnp.zeros((1, 3)), jnp.zeros(1)), 0.1)
    assert after.metadata["status"] == Status.THETA_REJECTED
    assert after.metadata["n_rejected"] == 0
    np.testing.assert_allclose(after.hyperparams, 0.4)  # tuned all the same, with theta = 1


def test_a_fit_on_nan_is_refused():
    problem, inner, lam, window = started(outer_lam, 3)
    bad = window._replace(val=(window.val[0] * jnp.nan, window.val[1]))
    for settings in ({}, {"theta_guard": False}):
        memory = fitted((problem, inner, lam, bad), 0.9, **settings)
        assert float(memory.theta) == 1.0 and memory.status == Status.THETA_REJECTED


def test_theta_of_a_meta_batch_is_one_fit_to_all_tasks():
    """sum x y / sum x^2 over steps and tasks, every task with the same theta."""
    task = outer_lam(3)
    starts = [task.begin(3, jax.random.key(seed)) for seed in range(2)]
    lam = task.hyperparams
    first = starts[0][1]
    other = jax.tree.map(lambda x: x[::-1] * 0.5 if x.dtype.kind == "f" else x[::-1], first)
    windows = (first, other)
    single = [fitted((task.problem, starts[0][0], lam, w), 0.8) for w in windows]
    # By its definition: theta_i is the slope of task i, and R^2 and theta give the two sums.
    method = over_tasks(hyperdistill(0.8), 2)
    both = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *windows)
    inner = jax.tree.map(lambda x: jnp.stack([x, x]), starts[0][0])
    memory = method.init(inner, lam, both)
    pooled = method.start(task.problem, memory, inner, lam, both)
    thetas = np.array([float(m.theta_fit) for m in single])
    assert abs(thetas[0] - thetas[1]) > 1e-3
    assert pooled.theta.shape == (2,) and pooled.theta[0] == pooled.theta[1]
    assert thetas.min() < float(pooled.theta_fit[0]) < thetas.max()
    again = jax.tree.map(lambda *x: jnp.stack(x, axis=1), first, first)
    pooled = method.start(task.problem, memory, inner, lam, again)
    np.testing.assert_allclose(pooled.theta_fit, thetas[0], rtol=1e-10)


@pytest.mark.parametrize(
    "rates, accepted",
    [
        ([0.1, 0.5, -0.3, 0.5, 0.6, 1.4], False),  # 1.15, R^2 0.44
        ([1.0, -1.0, 1.0, -0.2, 0.1, -0.7], True),  # below 1
        ([1.0] * 6, True),  # equal terms, 1.25: nothing is forgotten
    ],
    ids=["comes and goes", "small", "equal"],
)
def test_a_theta_above_one_needs_a_good_fit(rates, accepted):
    problem = BilevelProblem(
        from_update(lambda w, lam, rate: w - rate * lam), lambda w, lam, batch: jnp.sum(w)
    )
    case = problem, *started_at(problem), Window(np.array(rates), np.zeros(6))
    memory = fitted(case, 0.9)
    assert 0 < float(memory.theta_fit) < 1.1 * 6 / sum(0.9**t for t in range(6))
    assert (int(memory.status) == Status.OK) == accepted
    assert float(memory.theta) == (float(memory.theta_fit) if accepted else 1.0)
    if not accepted:
        assert float(memory.theta_fit) > 1 and float(memory.theta_r2) < 0.7
        free = fitted(case, 0.9, theta_guard=False)
        assert float(free.theta) == float(free.theta_fit)


def started_at(problem):
    lam = jnp.array(0.1)
    return problem.dynamics.init(jnp.array(0.0), lam), lam
