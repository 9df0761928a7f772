"""Eq. (7) of Lee et al. (2022): against dense matrices, the line, and the gradient of FOMAML."""

import jax
import jax.numpy as jnp
import optax
import pytest
from dense_formulas import started, whole_window, written_out

from gradhpo import (
    BilevelProblem,
    Start,
    Window,
    discounted_sum,
    drmad,
    from_optax,
    one_step,
    reverse,
)
from gradhpo.core.start import Origin, begin_episode
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.testing.problems import ZOO, mlp_momentum, straight_line

pytestmark = pytest.mark.usefixtures("x64")
T, GAMMA = 3, 0.7


@pytest.mark.parametrize("name", ["mlp_momentum", "outer_lam", "nested", "ridge"])
def test_it_is_its_formula(name):
    case, dense = written_out(ZOO[name], T)
    got = whole_window(discounted_sum(GAMMA, T), *case).hypergrad
    assert_trees_close(got, dense.tree(dense.discounted_sum(GAMMA)), 1e-12)
    wrong = dense.tree(dense.greedy(GAMMA))  # alpha_t in the place of alpha_T
    assert relative_error(got, wrong) > 1e-3


def test_without_a_discount_for_the_past_it_is_one_step():
    case = started(mlp_momentum, T)
    got = whole_window(discounted_sum(0.0, T), *case).hypergrad
    last = Window(*jax.tree.map(lambda x: x[T - 1 :], tuple(case.window)))
    inner = case.inner
    for t in range(T - 1):
        inner = case.problem.dynamics.step(
            inner, case.lam, jax.tree.map(lambda x, t=t: x[t], case.window.train)
        )
    one = whole_window(one_step(), case.problem, inner, case.lam, last).hypergrad
    assert_trees_close(got, one, 1e-12)


def test_on_a_straight_line_the_points_are_those_of_training():
    case = started(straight_line, T)
    line, path = (
        whole_window(discounted_sum(GAMMA, T, points=points), *case).hypergrad
        for points in ("line", "trajectory")
    )
    assert_trees_close(line, path, 1e-10)
    case = started(mlp_momentum, T)
    line, path = (
        whole_window(discounted_sum(GAMMA, T, points=points), *case).hypergrad
        for points in ("line", "trajectory")
    )
    assert relative_error(line, path) > 1e-4


def test_first_order_maml_is_the_gradient_at_the_adapted_weights():
    def loss(w, lam, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

    x = jax.random.normal(jax.random.key(0), (2, T, 8, 3))
    window = Window(*((half, jnp.sin(half.sum(-1))) for half in x))
    problem = BilevelProblem(
        from_optax(loss, optax.sgd(0.3, momentum=0.5)), loss, begin=lambda w, lam, draw: Start(lam)
    )
    weights = jnp.array([0.3, -0.2, 0.5])
    origin = Origin(problem.dynamics.init(weights, weights)._replace(opt_state=()), None)
    inner, _ = begin_episode(problem, origin, weights)

    def hypergrad(gamma):
        method = discounted_sum(gamma, T)
        return method.estimate(problem, (), inner, weights, window, origin).hypergrad

    # The update rule of first-order MAML, written out.
    w, v = weights, jnp.zeros(3)
    for t in range(T):
        batch = jax.tree.map(lambda x, t=t: x[t], window.train)
        v = 0.5 * v + jax.grad(loss)(w, None, batch)
        w = w - 0.3 * v
    first_order = jax.grad(loss)(w, None, jax.tree.map(lambda x: x[-1], window.val))
    assert_trees_close(hypergrad(1.0), first_order, 1e-12)
    assert_trees_close(hypergrad(0.5), first_order * 0.5**T, 1e-12)


def test_slots_ignored_leave_the_hessian_alone():
    """A quadratic under momentum, in closed form: `eta alpha_T sum (I - eta H)^(T-t)`, where the
    exact hypergradient has the velocity in it. The points of the line do not matter there."""
    H = jnp.array([[2.0, 0.3], [0.3, 1.0]])
    rate, momentum, steps = 0.2, 0.8, 6
    problem = BilevelProblem(
        from_optax(lambda w, lam, b: 0.5 * w @ H @ w - lam @ w, optax.sgd(rate, momentum)),
        lambda w, lam, batch: jnp.sum(w**3),
    )
    lam, data = jnp.array([0.5, -1.0]), jnp.zeros(steps)
    case = problem, problem.dynamics.init(jnp.ones(2), lam), lam, Window(data, data)

    alpha = total = 3 * whole_window(reverse(steps), *case).inner.params ** 2
    for _ in range(steps - 1):
        total = alpha + (jnp.eye(2) - rate * H) @ total
    ignored = whole_window(drmad(steps, slots="ignored"), *case).hypergrad
    assert_trees_close(ignored, rate * total, 1e-12)
    exact = whole_window(reverse(steps), *case).hypergrad
    assert_trees_close(whole_window(drmad(steps), *case).hypergrad, exact, 1e-12)
    assert relative_error(ignored, exact) > 0.3
