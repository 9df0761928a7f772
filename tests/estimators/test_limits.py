"""Limits in which methods coincide or become exact, and the rates at which they do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_formulas import Dense, every_step, started, whole_window

from gradhpo import (
    BilevelProblem,
    Window,
    finite_difference,
    first_order,
    from_optax,
    greedy,
    hyperdistill,
    one_step,
    reverse,
)
from gradhpo.testing import (
    assert_trees_close,
    relative_error,
    unrolled_loss,
)
from gradhpo.testing.problems import (
    CONTRACTION_GAMMA,
    contraction,
    contraction_nonlinear,
    learning_rates,
    mlp_momentum,
    outer_lam,
    quadratic_penalty,
)

pytestmark = pytest.mark.usefixtures("x64")
T = 3


def test_three_learning_rates_have_three_derivatives():
    """T1-T2 on a vector of rates: -alpha_i eta'(lam_i) dL_i, not one number copied."""
    problem, inner, lam, window = started(learning_rates, 1)
    w, d, v = inner.params, window.train[0], window.val[0]
    gradient = jnp.array([0.5, 1.0, 3.0]) * (w - d)
    alpha = w - jax.nn.softplus(lam) * gradient - v
    want = -alpha * jax.nn.sigmoid(lam) * gradient
    assert len(set(np.round(want, 6).tolist())) == 3
    for estimator in (one_step(), finite_difference(), finite_difference(1.0), reverse(1)):
        got = whole_window(estimator, problem, inner, lam, window).hypergrad
        assert_trees_close(got, want, 1e-12)


def test_difference_error_falls_with_the_square_of_the_radius():
    """Slope 2 between r = 1e-1 and 1e-3, and 1e-9 at r = 1e-5."""
    case = started(mlp_momentum, 1)
    exact = whole_window(one_step(), *case).hypergrad
    radii = np.array([1e-1, 1e-2, 1e-3])
    errors = [
        relative_error(whole_window(finite_difference(float(r)), *case).hypergrad, exact)
        for r in radii
    ]
    slope = np.polyfit(np.log(radii), np.log(errors), 1)[0]
    assert 1.9 < slope < 2.1, (slope, errors)
    assert relative_error(whole_window(finite_difference(1e-5), *case).hypergrad, exact) < 1e-9


def test_differences_are_exact_for_a_quadratic_penalty():
    """Exact at a radius as large as 1; and not exact where the mixed term is not quadratic."""
    case = started(quadratic_penalty, 1)
    exact = whole_window(one_step(), *case).hypergrad
    for radius in (1.0, 0.01):
        got = whole_window(finite_difference(radius), *case).hypergrad
        assert_trees_close(got, exact, 1e-12)
    control = started(mlp_momentum, 1)
    exact = whole_window(one_step(), *control).hypergrad
    off = relative_error(whole_window(finite_difference(1.0), *control).hypergrad, exact)
    assert off > 1e-3


@pytest.mark.parametrize("estimator", [one_step(), finite_difference()], ids=["exact", "darts"])
@pytest.mark.parametrize("xi", [0.0, 0.3, 0.5, 0.7])
def test_darts_toy_fixed_points(estimator, xi):
    """With virtual step xi the hypergradient vanishes at lam = w = 2 / (1 + 2 xi)."""

    def train_loss(w, lam, batch):
        return w**2 - 2 * lam * w + lam**2

    def val_loss(w, lam, batch):
        return lam * w - 2 * lam + 1

    problem = BilevelProblem(from_optax(train_loss, optax.sgd(xi)), val_loss)
    window = Window(jnp.zeros(1), jnp.zeros(1))
    for point, want in ((2 / (1 + 2 * xi), 0.0), (1.3, 1.3 * (1 + 2 * xi) - 2)):
        inner = problem.dynamics.init(jnp.array(point), jnp.array(point))
        got = whole_window(estimator, problem, inner, jnp.array(point), window)
        np.testing.assert_allclose(got.hypergrad, want, atol=1e-9)


def test_greedy_limits():
    """gamma = 0 and T = 1 are one-step; gamma -> 0 is continuous."""
    case = problem, inner, lam, window = started(outer_lam, T)
    dense = Dense.of(*case)
    last = every_step(one_step(), *case)[-1].hypergrad
    assert_trees_close(whole_window(greedy(0.0, T), *case).hypergrad, last, 1e-14)
    near = whole_window(greedy(1e-9, T), *case).hypergrad
    assert relative_error(near, last) < 1e-8
    first = Window(*jax.tree.map(lambda x: x[:1], tuple(window)))
    assert_trees_close(
        whole_window(greedy(0.9, 1), problem, inner, lam, first).hypergrad,
        whole_window(one_step(), problem, inner, lam, first).hypergrad,
        1e-14,
    )
    assert relative_error(last, dense.tree(dense.greedy(0.9))) > 1e-3  # the limits are not trivial


def test_sums_on_the_contraction():
    """Greedy exact for a linear outer loss; eq. (7) and HyperDistill for any."""
    linear, bent = started(contraction, 6), started(contraction_nonlinear, 6)
    for case in (linear, bent):
        problem, inner, lam, window = case
        exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)  # noqa: B023
        dense = Dense.of(*case)
        assert_trees_close(dense.tree(dense.discounted_sum(CONTRACTION_GAMMA)), exact, 1e-12)
        distilled = every_step(hyperdistill(CONTRACTION_GAMMA, theta=1.0), *case)[-1]
        assert_trees_close(distilled.hypergrad, exact, 1e-12)
        got = whole_window(greedy(CONTRACTION_GAMMA, 6), *case).hypergrad
        if case is linear:
            assert_trees_close(got, exact, 1e-12)
        else:
            assert relative_error(got, exact) > 1e-2
        for wrong in (0.7, 0.9):  # and the discount matters
            assert relative_error(whole_window(greedy(wrong, 6), *case).hypergrad, exact) > 1e-2


def test_first_order_is_zero_where_lam_is_not_in_the_outer_loss():
    """The direct term alone; exact where the weights do not react."""
    got = every_step(first_order(), *started(mlp_momentum, 3))
    assert all(float(jnp.max(jnp.abs(x))) == 0.0 for x in jax.tree.leaves(got[-1].hypergrad))
    problem, inner, lam, window = started(outer_lam, 1)
    frozen = problem._replace(
        dynamics=problem.dynamics._replace(step=lambda s, lam, batch: s, parts=None)
    )
    exact = jax.grad(lambda x: unrolled_loss(frozen, inner, x, window))(lam)
    got = whole_window(first_order(), frozen, inner, lam, window).hypergrad
    assert_trees_close(got, exact, 1e-14)
    assert_trees_close(whole_window(reverse(1), frozen, inner, lam, window).hypergrad, exact, 1e-14)
