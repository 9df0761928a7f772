"""Projections: the nearest point, as others find it, and in the set."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize

from gradhpo import spaces
from gradhpo.spaces import budget, simplex_rows
from gradhpo.spaces.projections import _at_lower, _search

pytestmark = pytest.mark.usefixtures("x64")
SIZES = st.sampled_from([1, 2, 5, 12])  # each a program
VECTORS = hnp.arrays(np.float64, SIZES, elements=st.floats(-5, 5, allow_subnormal=False))


def nearest(x, total):
    """By a search over the multiplier, with scipy."""
    if np.clip(x, 0, 1).sum() <= total:
        return np.clip(x, 0, 1)
    tau = optimize.brentq(
        lambda tau: np.clip(x - tau, 0, 1).sum() - total, 0, x.max(), xtol=1e-15, rtol=1e-15
    )
    return np.clip(x - tau, 0, 1)


@settings(deadline=None, max_examples=150)
@given(VECTORS, st.floats(0, 6))
def test_budget_is_nearest_feasible_and_idempotent(x, total):
    got = np.asarray(jax.jit(budget)(x, total))
    np.testing.assert_allclose(got, nearest(x, total), atol=1e-10)
    assert got.min() >= 0 and got.max() <= 1 and got.sum() <= total + 1e-12
    np.testing.assert_allclose(budget(got, total), got, atol=1e-12)


def test_budget_of_a_tree_with_other_bounds():
    """By a quadratic program: no feasible point is nearer (the variational inequality)."""
    draw = np.random.default_rng(0)
    x = {"a": jnp.asarray(draw.normal(size=(3, 2))), "b": jnp.asarray(draw.normal(size=4) + 1)}
    p = budget(x, 1.5, -0.5, 2.0)
    flat = np.concatenate([np.ravel(v) for v in jax.tree.leaves(p)])
    want = np.concatenate([np.ravel(v) for v in jax.tree.leaves(x)])
    assert flat.sum() == pytest.approx(1.5, abs=1e-12)
    for _ in range(200):
        z = draw.uniform(-0.5, 2.0, 10)
        if z.sum() <= 1.5:
            assert (want - flat) @ (z - flat) <= 1e-10


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-5, 5, allow_subnormal=False)))
def test_rows_on_the_simplex(x):
    got = np.asarray(simplex_rows(jnp.asarray(x)))
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-12)
    assert got.min() >= 0
    np.testing.assert_allclose(simplex_rows(jnp.asarray(got)), got, atol=1e-12)
    for row, p in zip(x, got, strict=True):
        tau = optimize.brentq(
            lambda t, row=row: np.maximum(row - t, 0).sum() - 1,
            row.min() - 1,
            row.max(),
            xtol=1e-15,
        )
        np.testing.assert_allclose(p, np.maximum(row - tau, 0), atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(VECTORS, st.floats(0.1, 20))
def test_simplex_of_any_size(x, total):
    """By the sort of Optax."""
    got = np.asarray(simplex_rows(jnp.asarray(x), total))
    np.testing.assert_allclose(got.sum(), total, rtol=1e-12)
    want = optax.projections.projection_simplex(jnp.asarray(x), total)
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_simplex_with_ties_and_with_one_number_that_is_far_above():
    np.testing.assert_array_equal(simplex_rows(jnp.array([3.0, 3.0, 3.0, 3.0])), [0.25] * 4)
    np.testing.assert_array_equal(simplex_rows(jnp.array([1e30, 0.0, -1e30])), [1, 0, 0])
    assert np.isnan(simplex_rows(jnp.array([jnp.nan, 1.0]))).any()  # refused by the guard of a step


PROJECTED = {
    "interval": (spaces.interval(-1, 2, by="projection"), lambda z: -1 + 3 * z),
    "integer": (spaces.integer(-1, 2), lambda z: -1 + 3 * z),
    "simplex": (spaces.simplex(by="projection"), lambda z: z / z.sum()),
}


@pytest.mark.parametrize("name", PROJECTED)
@settings(deadline=None, max_examples=60)
@given(x=VECTORS, seed=st.integers(0, 2**16))
def test_projections_of_spaces(name, x, seed):
    """Idempotent, feasible, and no feasible point is nearer: (x - p) (z - p) <= 0."""
    space, feasible = PROJECTED[name]
    p = np.asarray(space.project(jnp.asarray(x)))
    np.testing.assert_allclose(space.project(jnp.asarray(p)), p, atol=1e-12)
    assert name == "integer" or space.refuses(p) is None
    draw = np.random.default_rng(seed)
    for _ in range(20):
        assert (x - p) @ (feasible(draw.uniform(1e-3, 1, len(x))) - p) <= 1e-9


def test_many_numbers_in_float32():
    x = jax.random.normal(jax.random.key(0), (100_000,), jnp.float32)
    got = budget(x, 1000.0)
    assert got.dtype == jnp.float32
    assert float(jnp.sum(got)) == pytest.approx(1000, rel=1e-5)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: budget(x, 1.0, lower=0.5), "3 numbers of at least lower=0.5 sum to 1.5"),
        (lambda x: budget(x, -1.0), "above total=-1.0: nothing is feasible"),
        (lambda x: budget(x, np.nan), "nothing is feasible"),
        (lambda x: budget(x, 1.0, lower=2.0), "between lower=2.0 and upper=1.0"),
        (lambda x: budget(x, 1.0, lower=-np.inf), "lower is infinite"),
        (lambda x: simplex_rows(x, 0.0), "total must be positive"),
    ],
)
def test_an_empty_set_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(jnp.ones(3))
    with pytest.raises(ValueError, match=text):
        jax.jit(call)(jnp.ones(3))  # the bounds are numbers there, too


@settings(deadline=None, max_examples=60)
@given(VECTORS, st.integers(0, 5), st.floats(0.1, 3))
def test_nearest_with_steps_by_coordinate(x, seed, total):
    """The conditions of the minimum of `sum (z - x)^2 / step`: one multiplier for what is inside,
    its sign at the bounds."""
    step = np.random.default_rng(seed).uniform(0.01, 10, x.shape)
    for z, most in ((simplex_rows(x, total, step=step), np.inf), (budget(x, total, step=step), 1)):
        z = np.asarray(z)
        slope = (x - z) / step
        assert z.min() >= 0 and z.max() <= most and z.sum() <= total + 1e-9
        binding = most == np.inf or z.sum() > total - 1e-9
        tau = np.median(slope[(z > 0) & (z < most)]) if ((z > 0) & (z < most)).any() else None
        if not binding:
            np.testing.assert_allclose(z, np.clip(x, 0, 1), atol=1e-12)
        elif tau is not None:
            np.testing.assert_allclose(slope[(z > 0) & (z < most)], tau, atol=1e-7)
            assert (slope[z == 0] <= tau + 1e-7).all() and (slope[z == most] >= tau - 1e-7).all()
        if most == np.inf:
            assert z.sum() == pytest.approx(total, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 2**16), st.floats(0, 8), st.floats(0.1, 3))
def test_steps_of_very_different_lengths_keep_the_digits_of_float32(n, seed, spread, total):
    """As Adam's are: hypergradients of ten orders of magnitude. By bisection in long doubles."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=n).astype(np.float32)
    step = np.exp(spread * draw.normal(size=n)).astype(np.float32)
    got = simplex_rows(jnp.asarray(x), np.float32(total), step=step)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, at_multiplier(x, step, total, np.inf), atol=2e-6)
    got = budget(jnp.asarray(x), np.float32(total), step=jnp.asarray(step))
    np.testing.assert_allclose(got, at_multiplier(x, step, total, 1), atol=2e-6)


def at_multiplier(x, step, total, most):
    x, step, total = (np.asarray(v, np.longdouble) for v in (x, step, np.float32(total)))
    if most < np.inf and np.clip(x, 0, most).sum() <= total:
        return np.clip(x, 0, most).astype(float)
    low = 0 if most < np.inf else ((x - total) / step).max()
    high = (x / step).max()
    for _ in range(20_000):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        over = np.clip(x - middle * step, 0, most).sum() > total
        low, high = (middle, high) if over else (low, middle)
    return np.clip(x - high * step, 0, most).astype(float)


@pytest.mark.parametrize("step", [None, np.array([0.5, 1.0, 2.0, 4.0, 0.1])])
@pytest.mark.parametrize("project", [simplex_rows, functools.partial(budget, total=1.0)])
def test_both_modes_differentiate_projections(project, step):
    x = jnp.array([0.5, 0.45, -0.3, 0.4, 0.6])
    jacobian = jax.jacrev(lambda x: project(x, step=step))(x)
    np.testing.assert_allclose(jax.jacfwd(lambda x: project(x, step=step))(x), jacobian, atol=1e-12)
    for i, e in enumerate(1e-6 * np.eye(5)):
        difference = (project(x + e, step=step) - project(x - e, step=step)) / 2e-6
        np.testing.assert_allclose(jacobian[:, i], difference, atol=1e-8)
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-12)


@pytest.mark.parametrize("project", [simplex_rows, budget])
def test_totals_and_steps_are_differentiated(project):
    x, seen = jnp.array([0.5, 0.45, -0.3, 0.4, 0.6]), jnp.arange(1.0, 6.0)

    def of(settings):
        return project(x, settings["total"], step=settings["step"]) @ seen

    at = {"total": jnp.array(0.9), "step": jnp.array([0.5, 1.0, 2.0, 4.0, 0.1])}
    jax.test_util.check_grads(of, (at,), order=1, atol=1e-6, rtol=1e-6)


def test_small_numbers_keep_their_digits_beside_a_large_one(x32):
    for large in (1e4, 1e8):
        got = budget(jnp.array([large, 0.3, 0.4]), 1.2)
        np.testing.assert_allclose(got, [1, 0.05, 0.15], atol=1e-6)
    draw = np.random.default_rng(0)
    x, step = draw.normal(size=100), np.exp(3 * draw.normal(size=100))
    for far in (1e3, 1e6):
        x_, step_ = jnp.asarray(x + far, jnp.float32), jnp.asarray(step, jnp.float32)
        for project in (simplex_rows, jax.jit(simplex_rows)):
            assert float(project(x_, step=step_).sum()) == pytest.approx(1, rel=1e-5)
    small = simplex_rows(jnp.asarray(x, jnp.float32), 1e-6, step=jnp.asarray(step, jnp.float32))
    assert float(small.sum()) == pytest.approx(1e-6, rel=1e-4)


@pytest.mark.parametrize("total", [0.25, 0.75])
def test_a_kink_for_every_number_takes_no_step_for_each(x32, total):
    """Gaps that Newton's method crosses one by one."""
    x = 0.5 + np.cumsum([0.0, *np.arange(399.0, 0, -1)])
    got = budget(jnp.asarray(x, jnp.float32), total)
    assert float(got.sum()) == pytest.approx(total, rel=1e-5)
    tau = _at_lower([jnp.asarray(x, jnp.float32)], [jnp.float32(1)], jnp.float32(0), None)
    numbers = [jnp.float32(value) for value in (total, 0, 1, 1e-6)]
    of, zero = [jnp.asarray(x, jnp.float32)], jnp.float32(0)
    found = _search(None, [jnp.float32(1)], *numbers, of, zero, zero, tau)
    assert int(found.steps) < 100


def test_large_numbers_keep_their_differences(x32):
    np.testing.assert_allclose(budget(jnp.full(4, 1e8), 1.0), 0.25)
    near = 1000 + 1e-4 * np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    assert float(budget(jnp.asarray(near), 1.0).sum()) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(budget(jnp.full(4, 1e9), -3.9, -1.0), -0.975, rtol=1e-6)
    np.testing.assert_allclose(simplex_rows(jnp.full(5, 1e5), step=jnp.full(5, 0.3)), 0.2)
    for x, want in (([2e38, 1e38, 0], [1, 0, 0]), ([3e38] * 3, [1 / 3] * 3)):
        np.testing.assert_allclose(jax.jit(simplex_rows)(jnp.array(x)), want, rtol=1e-6)
    low = budget(jnp.ones(5000, jnp.bfloat16), 100.0)
    assert low.dtype == jnp.bfloat16  # 0.02 is 0.02002 there
    assert float(low.astype(jnp.float32).sum()) == pytest.approx(100, rel=2e-3)
    rows = simplex_rows(jnp.full((1, 70_000), 2.0, jnp.float16))
    assert float(rows.astype(jnp.float32).sum()) == pytest.approx(1, rel=1e-2)
