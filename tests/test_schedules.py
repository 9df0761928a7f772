"""Schedules against Optax's, and their derivatives against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo.diagnostics import check_hypergradient
from gradhpo.schedules import piecewise, warmup_cosine, warmup_linear

COUNTS = np.arange(0, 41)
OURS = {"cosine": warmup_cosine, "linear": warmup_linear}


def optax_linear(start, peak, warmup, steps, end):
    parts = (
        optax.linear_schedule(start, peak, warmup),
        optax.linear_schedule(peak, end, steps - warmup),
    )
    return optax.join_schedules(parts, [warmup])


THEIRS = {"cosine": optax.warmup_cosine_decay_schedule, "linear": optax_linear}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("warmup, steps", [(10, 30), (1, 40), (39, 40)])
def test_the_values_are_those_of_optax(kind, warmup, steps):
    ours = OURS[kind](0.7, warmup, steps, start=0.1, end=0.05)
    theirs = THEIRS[kind](0.1, 0.7, warmup, steps, 0.05)
    np.testing.assert_allclose(jax.vmap(ours)(COUNTS), [theirs(t) for t in COUNTS], atol=2e-7)


@pytest.mark.parametrize("warmup", [0.0, -10.0])
def test_without_a_warm_up_the_first_rate_is_the_peak(warmup):
    rate, slope = jax.value_and_grad(lambda w: warmup_cosine(0.7, w, 30.0)(0))(warmup)
    assert rate == np.float32(0.7) and np.isfinite(slope)
    np.testing.assert_allclose(
        jax.vmap(warmup_cosine(0.7, warmup, 30.0))(COUNTS),
        [optax.cosine_decay_schedule(0.7, 30)(t) for t in COUNTS],
        atol=2e-7,
    )


@pytest.mark.parametrize("steps", [10.0, 5.0])
def test_a_warm_up_that_takes_all_steps_ends_at_the_end(steps):
    rates = jax.vmap(warmup_linear(1.0, 10.0, steps, end=0.2))(jnp.array([2, 4, 10, 11]))
    np.testing.assert_allclose(rates, [2 / steps, 4 / steps, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", ["peak", "warmup", "steps", "start", "end"])
def test_every_number_has_a_derivative(kind, name, x64):
    given = {"peak": 0.7, "warmup": 9.3, "steps": 31.7, "start": 0.1, "end": 0.05}

    @jax.jit
    def rates(value):
        return jax.vmap(OURS[kind](**given | {name: value}))(COUNTS)

    at, step = jnp.asarray(given[name]), 1e-6
    differences = (rates(at + step) - rates(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacfwd(rates)(at), differences, atol=1e-7)
    assert np.abs(differences).max() > 1e-3


def test_the_points_of_straight_lines_have_derivatives_in_both_directions(x64):
    def rates(values, at):
        return jax.vmap(piecewise(values, at))(COUNTS)

    values, at, step = jnp.array([0.1, 1.0, 0.0]), jnp.array([2.5, 10.3, 30.8]), 1e-6
    for argument, jacobian in enumerate(jax.jacfwd(rates, (0, 1))(values, at)):
        for i, unit in enumerate(step * jnp.eye(3)):
            moved = [[values, at], [values, at]]
            moved[0][argument] += unit
            moved[1][argument] -= unit
            differences = (rates(*moved[0]) - rates(*moved[1])) / (2 * step)
            np.testing.assert_allclose(jacobian[:, i], differences, atol=1e-7)


def test_points_may_be_lists_of_traced_numbers():
    def rate(peak):
        return piecewise([0.0, peak, 0.0], at=[0, 10, 40])(5)

    assert jax.grad(rate)(0.3) == 0.5


@pytest.mark.parametrize("values, at", [([0.1], [0, 1]), ([], []), (0.1, 1)])
def test_points_that_are_none(values, at):
    with pytest.raises(ValueError, match="as many rates as steps"):
        piecewise(values, at)


def test_a_vector_of_peaks_is_refused():
    with pytest.raises(ValueError, match=r"peak of a schedule is one number, got shape \(2,\)"):
        warmup_cosine(jnp.ones(2), 10, 30)


@pytest.mark.parametrize("steps", [np.float32(20), 20])
def test_rates_are_as_wide_as_what_is_given(steps):
    assert warmup_cosine(np.float32(1), 10, steps)(3).dtype == np.float32
    assert warmup_cosine(1, 10, 20)(3).dtype == jnp.result_type(float)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_counts_far(dtype):
    rate = warmup_linear(jnp.asarray(1e-2, dtype), 10, 100_000)
    lines = piecewise(jnp.asarray([1e-2, 0], dtype), at=[10, 100_000])
    for schedule in (rate, lines):
        assert schedule(20_000).dtype == dtype
        assert float(schedule(20_000)) == pytest.approx(8e-3, rel=1e-2)
        assert float(schedule(70_000)) == pytest.approx(3e-3, rel=1e-2)


def test_the_warm_up_of_adam_is_tuned_exactly():
    """The peak and both numbers of steps, through the slots of Adam, against differences."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, 16, 3))

    def loss(w, lam, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ w) - y[:, 0]) ** 2)

    def adam(lam):
        rate = warmup_cosine(jnp.exp(lam["log_peak"]), lam["warmup"], lam["steps"])
        return optax.adam(rate, eps_root=1e-8)

    lam = {"log_peak": np.log(0.3), "warmup": 3.4, "steps": 9.1}
    data = gh.InOrder((x, y))
    task = gh.Task(gh.BilevelProblem(gh.from_optax(loss, adam), loss), np.ones(3), lam, data, data)
    got = check_hypergradient(task, 8, ["reverse", "one_step"], truth="differences")
    assert got.rows["reverse"].relative_error < 1e-8 < 1e-2 < got.rows["one_step"].relative_error
    assert all(abs(h) > 1e-5 for h in got.hypergrad.values())
