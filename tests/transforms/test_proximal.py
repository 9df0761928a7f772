"""Proximal outer updates: the maps against minimisers found by others, and where updates end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from gradhpo.outer import followed_by
from gradhpo.transforms.proximal import (
    elastic_net,
    group_lasso,
    in_box,
    l1,
    nuclear,
    on_simplex,
    proximal_adam,
    proximal_sgd,
    within_budget,
)

pytestmark = pytest.mark.usefixtures("x64")
PENALTIES = {
    "l1": l1(0.7),
    "elastic_net": elastic_net(0.4, 0.9),
    "group_lasso": group_lasso(0.8),
    "nuclear": nuclear(0.6),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_a_proximal_map_is_the_minimiser(name, eta):
    """No point around is better, by the strong convexity of what it minimises: the decrease to any
    other point is at least |z - p|^2 / (2 eta)."""
    penalty, draw = PENALTIES[name], np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((3, 4)) * 1.5)
    p = penalty.prox(x, jnp.asarray(eta))

    def objective(z):
        return penalty.value(z) + jnp.sum((z - x) ** 2) / (2 * eta)

    for size in (1e-6, 1e-3, 0.1, 1.0):
        for _ in range(20):
            z = p + size * jnp.asarray(draw.standard_normal(x.shape))
            gap = jnp.sum((z - p) ** 2) / (2 * eta)
            assert float(objective(z) - objective(p)) >= float(gap) * (1 - 1e-6) - 1e-15
    found = optimize.minimize(
        lambda z: float(objective(jnp.asarray(z.reshape(x.shape)))), np.asarray(p).ravel() * 0.99,
        method="Powell", options={"xtol": 1e-9, "ftol": 1e-15, "maxiter": 100_000},
    )  # fmt: skip
    assert float(objective(p)) <= found.fun + 1e-12


def test_closed_forms():
    x = jnp.array([[3.0, 4.0], [0.3, -0.4]])
    np.testing.assert_allclose(group_lasso(1.0).prox(x, 1.0), [[2.4, 3.2], [0, 0]], atol=1e-15)
    np.testing.assert_allclose(elastic_net(1.0, 1.0).prox(x, 1.0), [[1, 1.5], [0, 0]], atol=1e-15)
    np.testing.assert_allclose(
        nuclear(2.0).prox(jnp.diag(jnp.array([3.0, 1.0])), 1.0), [[1, 0], [0, 0]], atol=1e-15
    )
    for penalty in (l1(0.0), elastic_net(0.0, 0.0), group_lasso(0.0), nuclear(0.0)):
        np.testing.assert_allclose(penalty.prox(x, 5.0), x, atol=1e-14)


A = np.random.default_rng(1).standard_normal((12, 6))
B = A @ np.array([2.0, 0, 0, -1.0, 0, 0.02]) + 0.1 * np.random.default_rng(2).standard_normal(12)


def slope(lam):
    return A.T @ (A @ lam - B) / 12


OUTERS = {
    "sgd": proximal_sgd(0.1, l1(0.2)),
    "momentum": proximal_sgd(0.02, l1(0.2), momentum=0.9),
    "nesterov": proximal_sgd(0.02, l1(0.2), momentum=0.9, nesterov=True),
    "adam": proximal_adam(0.01, l1(0.2)),
}


@pytest.mark.parametrize("name", OUTERS)
def test_updates_end_at_the_lasso(name):
    """The minimiser of |A x - b|^2 / 24 + 0.2 |x|_1, by coordinate descent written here, and its
    conditions: |slope| at most 0.2 where x is 0, -0.2 sign(x) elsewhere."""
    want = np.zeros(6)
    for _ in range(2000):
        for i in range(6):
            rest = slope(want)[i] - want[i] * (A[:, i] @ A[:, i]) / 12
            want[i] = -np.sign(rest) * max(abs(rest) - 0.2, 0) * 12 / (A[:, i] @ A[:, i])
    assert 0 < (want == 0).sum() < 6

    outer = OUTERS[name]

    def step(carry, _):
        lam, slots = carry
        return outer.apply(slope(lam), slots, lam), None

    lam = jnp.ones(6)
    (lam, _), _ = jax.lax.scan(step, (lam, outer.init(lam)), None, length=40_000)
    # the steps of Adam grow where slopes do not vanish in the mean: it stays near
    np.testing.assert_allclose(lam, want, atol=1e-6 if name == "adam" else 1e-12)
    assert ((lam == 0) == (want == 0)).all()
    assert float(jnp.linalg.norm(lam - outer.settle(lam - slope(lam)))) < 1e-6


def test_a_step_of_momentum_is_not_the_rate():
    """By the rate alone the penalty would count a tenth."""
    plain = followed_by(
        optax.sgd(0.02, momentum=0.9), lambda lam: l1(0.2).prox(lam, jnp.asarray(0.02))
    )
    lam = jnp.ones(6)
    slots = plain.init(lam)
    for _ in range(300):
        lam, slots = plain.apply(slope(lam), slots, lam)
    rest = lam - OUTERS["momentum"].settle(lam - slope(lam))
    assert float(jnp.linalg.norm(rest)) > 0.1


def test_penalties_by_leaf_and_what_adam_refuses():
    lam = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 2)), "d": jnp.ones(1)}}
    outer = proximal_sgd(0.5, {"a": l1(1.0), "b": None})
    new, _ = outer.apply(jax.tree.map(jnp.zeros_like, lam), outer.init(lam), lam)
    np.testing.assert_allclose(new["a"], 0.5)
    np.testing.assert_allclose(new["b"]["c"], 1.0)
    with pytest.raises(ValueError, match="group_lasso is no sum"):
        proximal_adam(0.1, {"a": l1(1.0), "b": group_lasso(1.0)})
    with pytest.raises(TypeError, match="must be a Penalty"):
        proximal_sgd(0.1, 0.5)
    with pytest.raises(ValueError, match="momentum must be below 1"):
        proximal_sgd(0.1, l1(1.0), momentum=1.0)
    with pytest.raises(ValueError, match="weight"):
        l1(-1.0)


def test_the_first_step_of_adam_is_the_rate_over_the_slope():
    """Its averages are corrected: nu^ is the square of the only slope so far."""
    outer, lam = proximal_adam(0.1, l1(0.2), eps=0.0), jnp.array([2.0, 2.0, 0.3])
    h = jnp.array([0.5, -4.0, 2.0])
    new, _ = outer.apply(h, outer.init(lam), lam)
    step = 0.1 / np.abs(h)
    np.testing.assert_allclose(new, lam - 0.1 * np.sign(h) - step * 0.2, rtol=1e-6)


def test_a_coordinate_without_slope_is_moved_by_the_penalty_alone():
    """By `rate`, not by `rate / eps`, which would end all in one step."""
    outer = proximal_adam(0.01, {"a": l1(1e-4), "b": on_simplex()})
    lam = {"a": jnp.full(3, 0.3), "b": jnp.array([0.2, 0.8])}
    new, _ = outer.apply(jax.tree.map(jnp.zeros_like, lam), outer.init(lam), lam)
    np.testing.assert_allclose(new["a"], 0.29, rtol=1e-6)
    np.testing.assert_allclose(new["b"], lam["b"], rtol=1e-6)


def test_the_dtype_is_kept():
    lam, h = jnp.ones(2, jnp.bfloat16), jnp.array([0.0, 1.0], jnp.bfloat16)
    outer = proximal_adam(0.125, elastic_net(0.1, 0.0))
    moved = jax.jit(lambda h: outer.apply(h, outer.init(lam), lam)[0])(h)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(moved.astype(float), [0.875, 0.875 - 0.0125], rtol=1e-2)


def test_a_stack_of_matrices_is_taken_one_by_one():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)))
    want = jnp.stack([nuclear(0.5).prox(each, 1.0) for each in x])
    np.testing.assert_allclose(nuclear(0.5).prox(x, 1.0), want, atol=1e-12)
    with pytest.raises(ValueError, match=r"not of shape \(2,\)"):
        nuclear(0.5).value(jnp.ones(2))


def test_small_rows_are_rows():
    np.testing.assert_array_equal(group_lasso(1.0).prox(jnp.full((2, 3), 1e-170), 1.0), 0)


def test_constraints_are_projections():
    x = jnp.array([0.9, 0.8, -1.0])
    np.testing.assert_allclose(in_box(0, 1).prox(x, 3.0), [0.9, 0.8, 0])
    np.testing.assert_allclose(on_simplex().prox(x, 3.0), [0.55, 0.45, 0], atol=1e-12)
    np.testing.assert_allclose(within_budget(1.0).prox(x, 3.0), [0.55, 0.45, 0], atol=1e-12)
    assert within_budget(1.0).value(x) == 0


@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize("part_unseen", [0, 30])
def test_adam_keeps_its_constraint_in_float32(x32, spread, part_unseen):
    """Hypergradients of all sizes, and some that are 0."""
    draw = np.random.default_rng(0)
    scale = np.exp(spread * draw.normal(size=300)).astype(np.float32)
    scale[:part_unseen] = 0
    goal = draw.uniform(0, 1, 300).astype(np.float32)
    for penalty in (on_simplex(150.0), within_budget(150.0)):
        outer, lam = proximal_adam(0.05, penalty), jnp.full(300, 0.5, jnp.float32)
        slots, apply = outer.init(lam), jax.jit(outer.apply)
        for _ in range(30):
            lam, slots = apply(scale * (lam - goal - 0.5), slots, lam)
            assert float(lam.sum()) == pytest.approx(150, abs=1e-2)
            assert float(lam.min()) >= 0 and float(lam.max()) < 2


def test_adam_with_a_number_not_seen_yet():
    """It has the longest step of the leaf; the first update by hand."""
    outer, lam = proximal_adam(0.1, on_simplex()), jnp.array([0.5, 0.3, 0.2])
    got, _ = outer.apply(jnp.array([0.0, 1.0, 2.0]), outer.init(lam), lam)
    tau = (0.5 + 0.2 + 0.1 - 1) / (0.1 + 0.1 + 0.05)
    np.testing.assert_allclose(got, [0.5 - 0.1 * tau, 0.2 - 0.1 * tau, 0.1 - 0.05 * tau], atol=1e-7)


@pytest.mark.parametrize("settings", [{"b1": 1.0}, {"b2": 1.0}, {"b1": -0.1}, {"eps": -1e-8}])
def test_settings_of_adam_are_checked(settings):
    jax.jit(lambda settings: proximal_adam(0.1, l1(0.1), **settings).init(1.0))(settings)  # traced
    with pytest.raises(ValueError, match=next(iter(settings))):
        proximal_adam(0.1, l1(0.1), **settings)
