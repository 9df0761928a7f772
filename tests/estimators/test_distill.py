"""HyperDistill: its running averages, its draws, its fit, its guard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_formulas import Dense, at, episode, equal_batches, flat_state, started, without_slots
from scipy import stats

from gradhpo import (
    BilevelProblem,
    Status,
    Window,
    bilevel_step,
    from_update,
    hyperdistill,
    init_state,
    one_step,
    run_episode,
    update_w_star,
)
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.testing.problems import (
    integer_leaves,
    mlp_momentum,
    outer_lam,
)
from gradhpo.utils.gradients import geometric_sum

pytestmark = pytest.mark.usefixtures("x64")


# -- averages --------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_recurrences_are_the_closed_forms(gamma):
    """S_t, p_t of eq. (13) and p_s of eq. (17), which are not the same number."""
    S = 0.0
    for t in range(1, 40):
        before, S = S, gamma * S + 1
        np.testing.assert_allclose(geometric_sum(gamma, t), S, rtol=1e-13)
        np.testing.assert_allclose(S, t if gamma == 1 else (1 - gamma**t) / (1 - gamma), rtol=1e-13)
        newest, oldest = 1 - 1 / S, before / S
        if gamma < 1:
            np.testing.assert_allclose(
                newest, (gamma - gamma**t) / (1 - gamma**t), atol=1e-13, rtol=1e-13
            )
            np.testing.assert_allclose(
                oldest, (1 - gamma ** (t - 1)) / (1 - gamma**t), atol=1e-13, rtol=1e-13
            )
        assert (abs(newest - oldest) < 1e-12) == (gamma == 1 or t == 1)
        got = update_w_star(jnp.array(3.0), jnp.array(5.0), gamma, t)
        np.testing.assert_allclose(got, newest * 3 + (1 - newest) * 5, rtol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
def test_memory_follows_the_closed_form(gamma):
    """w*_t weighs s_{i-1} by gamma^(t-i) / S_t; over slots as well as weights."""
    case = started(mlp_momentum, 4)
    dense = Dense.of(*case)
    estimator = hyperdistill(gamma, theta=1.0)
    memory = estimator.init(*case[1:])
    for t, got in enumerate(episode(estimator, case[0], memory, *case[1:]), start=1):
        want = flat_state(dense.averaged_point(gamma, t))
        np.testing.assert_allclose(flat_state(got.memory.w_star), want, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(got.memory.weight, dense.weight(gamma, t), rtol=1e-14)


def test_gamma_zero_is_one_step_over_an_episode():
    """Equal to the last bit that two programs share."""
    problem, inner, lam, window = started(mlp_momentum, 4)
    distill, one = hyperdistill(0.0, theta=1.0), one_step()
    memory = distill.init(inner, lam, window)
    got = episode(distill, problem, memory, inner, lam, window)
    want = episode(one, problem, (), inner, lam, window)
    for a, b in zip(got, want, strict=True):
        assert_trees_close(a.hypergrad, b.hypergrad, 1e-14)
    for a, b in zip(
        jax.tree.leaves(got[-1].memory.data), jax.tree.leaves(window.train), strict=True
    ):
        np.testing.assert_array_equal(a, b[-1])


def test_reset_restarts_the_episode_and_keeps_the_rest():
    problem, inner, lam, window = started(outer_lam, 3)
    estimator = hyperdistill(0.9)
    memory = estimator.init(inner, lam, window)._replace(theta=jnp.array(0.25))
    after = episode(estimator, problem, memory, inner, lam, window)[-1].memory
    assert float(after.weight) == pytest.approx(1 + 0.9 + 0.81)
    fresh = estimator.reset(after, inner, lam)
    assert float(fresh.weight) == 0.0
    assert float(fresh.theta) == 0.25
    assert int(fresh.draws) == int(after.draws) == 3
    assert jnp.array_equal(jax.random.key_data(fresh.key), jax.random.key_data(memory.key))
    # The first step of the new episode sees nothing of the old: w*_1 = w_0, D*_1 = D_1.
    other = Window(*jax.tree.map(lambda x: x[::-1], tuple(window)))
    again = episode(estimator, problem, fresh, inner, lam, other)[0].memory
    np.testing.assert_array_equal(flat_state(again.w_star), flat_state(inner))
    np.testing.assert_array_equal(again.data[0], other.train[0][0])


# -- draws --------------------------------------------------------------------------------------


def counting_problem():
    """A batch is the number of its step in every slot."""
    dynamics = from_update(lambda w, lam, batch: w - lam * jnp.mean(w - batch))
    return BilevelProblem(dynamics, lambda w, lam, batch: w**2)


def sources(estimator, steps, slots):
    """Which step every slot of D* comes from, after `steps` steps."""
    problem, lam, inner = counting_problem(), jnp.array(0.1), None
    inner = problem.dynamics.init(jnp.array(1.0), lam)
    train = jnp.broadcast_to(jnp.arange(1.0, steps + 1)[:, None], (steps, slots))
    window = Window(train, jnp.zeros(steps))
    memory = estimator.init(inner, lam, window)
    return [
        np.asarray(g.memory.data) for g in episode(estimator, problem, memory, inner, lam, window)
    ]


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_slots_come_from_step_i_with_probability_gamma_to_the_age(gamma):
    steps, slots = 8, 100_000
    last = sources(hyperdistill(gamma, theta=1.0, seed=3), steps, slots)[-1]
    seen = np.bincount(last.astype(int), minlength=steps + 1)[1:]
    weights = gamma ** (steps - np.arange(1, steps + 1.0))
    expected = slots * weights / weights.sum()
    assert stats.chisquare(seen, expected).pvalue > 1e-3
    newest_wrong = slots * weights[::-1] / weights.sum()  # the classic confusion of p_t and p_s
    assert gamma == 1 or stats.chisquare(seen, newest_wrong).pvalue < 1e-12


def test_round_admits_the_papers_number_and_falls_into_its_trap():
    """n - round(n p_t) new slots at every step; none at all once n / S_t < 1/2."""
    slots, gamma = 10, 0.99
    seen = sources(hyperdistill(gamma, theta=1.0, sampling="round"), 40, slots)
    for t in range(2, 41):
        S = sum(gamma**i for i in range(t))
        new = int(np.sum(seen[t - 1] == t))
        assert new == slots - np.floor(slots * (1 - 1 / S) + 0.5), t
    assert slots / sum(gamma**i for i in range(40)) < 0.5
    assert not np.any(seen[-1] > 25)
    bernoulli = sources(hyperdistill(gamma, theta=1.0), 40, slots)[-1]
    assert np.any(bernoulli > 25)


def test_draws_differ_between_steps_episodes_and_seeds():
    """One root key, folded with a count that no reset rewinds."""
    steps, slots = 2, 64

    def second_step(estimator, memory, reset):
        problem, lam = counting_problem(), jnp.array(0.1)
        inner = problem.dynamics.init(jnp.array(1.0), lam)
        window = Window(
            jnp.broadcast_to(jnp.arange(1.0, steps + 1)[:, None], (steps, slots)), jnp.zeros(steps)
        )
        if memory is None:
            memory = estimator.init(inner, lam, window)
        if reset:
            memory = estimator.reset(memory, inner, lam)
        return episode(estimator, problem, memory, inner, lam, window)[-1].memory

    estimator = hyperdistill(1.0, theta=1.0, seed=0)
    first = second_step(estimator, None, False)
    same = second_step(hyperdistill(1.0, theta=1.0, seed=0), None, False)
    np.testing.assert_array_equal(first.data, same.data)
    second = second_step(estimator, first, True)
    assert not np.array_equal(first.data, second.data)
    other = second_step(hyperdistill(1.0, theta=1.0, seed=1), None, False)
    assert not np.array_equal(first.data, other.data)


def test_batches_without_an_example_axis():
    """D*_t = D_t, whatever the shapes are; nothing of it is kept."""
    case = without_slots(outer_lam, 3)
    dense = Dense.of(*case)
    estimator = hyperdistill(0.8, theta=1.0)
    memory = estimator.init(*case[1:])
    assert memory.data == ()
    for t, got in enumerate(episode(estimator, case[0], memory, *case[1:]), start=1):
        assert got.memory.data == ()
        assert_trees_close(got.hypergrad, dense.tree(dense.hyperdistill(0.8, 1.0, t)), 1e-12)


def test_integer_leaves_take_their_current_value():
    """w* averages floats; the count in the weights stays the true count."""
    case = equal_batches(integer_leaves, 4)
    dense = Dense.of(*case)
    estimator = hyperdistill(0.8, theta=1.0)
    memory = estimator.init(*case[1:])
    seen = episode(estimator, case[0], memory, *case[1:])
    for t, got in enumerate(seen, start=1):
        assert_trees_close(got.hypergrad, dense.tree(dense.hyperdistill(0.8, 1.0, t)), 1e-12)
        assert got.memory.w_star.params["visits"] is None
        assert got.inner.params["visits"] == t and got.inner.params["visits"].dtype == jnp.int32
    # An averaged count would give another answer: visits enters the rate.
    halved = case[1]._replace(params={**case[1].params, "visits": jnp.int32(2)})
    other = Dense.of(case[0], halved, *case[2:])
    assert relative_error(seen[-1].hypergrad, other.tree(other.hyperdistill(0.8, 1.0, 4))) > 1e-3


def test_gamma_one_is_the_plain_mean():
    """S_t = t, every point and every slot alike: no 1 / (1 - gamma) anywhere."""
    case = equal_batches(outer_lam, 4)
    dense = Dense.of(*case)
    estimator = hyperdistill(1.0, theta=1.0)
    memory = estimator.init(*case[1:])
    got = episode(estimator, case[0], memory, *case[1:])[-1]
    mean = sum(flat_state(s) for s in dense.states[:4]) / 4
    np.testing.assert_allclose(flat_state(got.memory.w_star), mean, rtol=1e-13)
    assert float(got.memory.weight) == 4.0
    near = hyperdistill(1 - 1e-6, theta=1.0)
    close = episode(near, case[0], near.init(*case[1:]), *case[1:])[-1]
    assert 1e-9 < relative_error(close.hypergrad, got.hypergrad) < 1e-5


def test_a_bad_first_batch_is_not_remembered():
    """A state made without a batch allocates D* at its first step; NaN must not stay there."""
    problem, inner, lam, window = started(outer_lam, 3)
    estimator = hyperdistill(0.9, theta=1.0)
    step = jax.jit(bilevel_step(estimator), static_argnums=0)
    state = init_state(problem, estimator, None, inner.params, lam)  # no window
    windows = jax.tree.map(lambda x: x[:, None], window)
    bad = at(windows, 0)._replace(train=jax.tree.map(lambda x: x[:1] * jnp.nan, window.train))
    state = step(problem, state, bad, 1e-2)
    assert state.metadata["status"] == Status.NONFINITE_TRAIN_STATE
    for t in (1, 2, 1, 2):
        state = step(problem, state, at(windows, t), 1e-2)
        assert state.metadata["status"] == Status.OK, t
    assert state.metadata["n_rejected"] == 1


def test_unknown_batch_shape_in_a_scan_is_explained():
    """A1 of section 3: scanning needs a state that knows the batch; the error says so."""
    problem, inner, lam, window = started(outer_lam, 3)
    estimator = hyperdistill(0.9, theta=1.0)
    state = init_state(problem, estimator, None, inner.params, lam)
    with pytest.raises(ValueError, match="batch"):
        run_episode(estimator, None, problem, state, window, 1e-2)


def test_a_batch_of_another_size_is_explained():
    """Never a silent broadcast of a kept batch of one example to the new size."""
    problem, inner, lam, window = started(outer_lam, 2)
    estimator = hyperdistill(0.9, theta=1.0)
    small = Window(*jax.tree.map(lambda x: x[:1, :1], tuple(window)))
    state = init_state(problem, estimator, None, inner.params, lam, small)
    step = bilevel_step(estimator)
    state = step(problem, state, small, 1e-2)
    with pytest.raises((ValueError, TypeError), match="batch"):
        step(problem, state, Window(*jax.tree.map(lambda x: x[1:], tuple(window))), 1e-2)
