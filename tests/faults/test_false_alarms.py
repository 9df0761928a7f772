"""What is legal passes: guards of faults that are none."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    BilevelState,
    InOrder,
    OneStepOptimizer,
    Resident,
    Status,
    Task,
    f2sa,
    from_optax,
    soba,
    tune,
)

X = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)


def loss(w, lam, batch):
    return jnp.mean((batch @ w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.sum(jnp.square(w - jnp.array([0.2, 0.1], w.dtype)))


def task(dtype=np.float32, loss=loss, judge=judge, rate=0.1):
    source = Resident(X.astype(dtype))
    problem = BilevelProblem(from_optax(loss, optax.sgd(rate)), judge)
    return Task(problem, np.zeros(2, dtype), dtype(-3), source, source)


def test_a_system_whose_right_hand_side_vanishes_does_not_run_away():
    """Nor is it told so: u shrinks, more slowly than what it follows."""

    hessian, least = jnp.array([0.2, 1.0]), jnp.array([1.0, 2.0])

    def train(w, lam, batch):
        penalty = jnp.exp(lam) * jnp.sum(w**2) / 2
        return jnp.sum(hessian * jnp.square(w - least)) / 2 + penalty

    def val(w, lam, batch):
        return jnp.sum(jnp.square(w - least)) / 2

    newton = optax.stateless(lambda g, w: -0.9 * g / hessian)
    problem = BilevelProblem(from_optax(train, newton), val)
    source = Resident(X)
    held = Task(problem, np.zeros(2, np.float32), np.float32(-12), source, source)
    state = tune(held, soba(0.1), optax.sgd(1e-3), episodes=20, T=20)
    assert state.status_counts == {Status.OK: 400}


def test_half_precision_whose_norm_overflows_is_finite():
    held = task(np.float16, judge=lambda w, lam, batch: jnp.sum(w))
    held = held.replace(params=np.full(2, 300, np.float16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = tune(held, f2sa(), optax.sgd(0.1), episodes=1, T=10)
    assert Status.NONFINITE_HYPERGRAD not in state.status_counts


def test_a_warning_of_the_users_own_is_not_about_float64():
    def remarking(w, lam, batch):
        warnings.warn("my own remark", UserWarning, stacklevel=1)
        return judge(w, lam, batch)

    opt = OneStepOptimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    state = opt.init(np.zeros(2, np.float32), np.float32(-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="my own remark"):
            opt.step(state, X, X, loss, remarking)


def test_who_ignores_the_warning_of_float64_has_decided_so():
    def wide(w, lam, batch):
        return judge(w, lam, batch) + 0.0 * jnp.sum(jnp.ones(3, np.float64))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        tune(task(judge=wide), soba(0.1), optax.sgd(0.1), episodes=1, T=1)


def test_states_hold_arrays_of_numpy_and_trees_of_axes():
    state = BilevelState.create(jnp.zeros(3), jnp.array(0.1))
    many = jax.device_get(jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 3), state))
    assert many.update(step=np.zeros(3, np.int32)).step.shape == (3,)
    assert state.update(params=0).params == 0


def test_a_memory_error_of_a_callbacks_own_stays():
    def callback(episode, state):
        raise MemoryError("my own cache is full")

    with pytest.raises(MemoryError, match="^my own cache is full"):
        tune(task(), soba(0.1), optax.sgd(0.1), episodes=1, T=1, callback=callback)


def test_batches_without_width_are_a_dummy():
    assert InOrder(np.zeros((20, 0), np.float32)).length == 20
