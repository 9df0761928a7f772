"""NaN and infinity are undone and reported, wherever they come from."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_cases import (
    ESTIMATORS,
    LAM,
    PARAMS,
    PROBLEM,
    T,
    data,
    fresh,
)

from gradhpo import (
    BilevelProblem,
    Dynamics,
    Estimate,
    Estimator,
    InnerState,
    Status,
    Window,
    bilevel_step,
    forward,
    from_optax,
    from_update,
    hyperdistill,
    init_state,
    one_step,
    run_episode,
)
from gradhpo.core.episode import in_windows
from gradhpo.core.estimator import report
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_is_finite


def apart(w, lam, batch):
    """A validation loss whose derivative does not see the batch."""
    return jnp.sum(w["w"] ** 2) + jnp.sum(batch)


@pytest.mark.parametrize(
    "estimator, outer_loss, moves",
    [
        (forward(online=True), PROBLEM.outer_loss, True),  # Z goes with s_t
        (hyperdistill(0.9, theta=1.0), apart, False),
    ],
    ids=["rtho", "hyperdistill"],
)
def test_what_is_remembered_of_a_bad_validation_batch(estimator, outer_loss, moves):
    """A memory that belongs to s_t moves on, another stays, even if the derivative is finite."""
    problem = PROBLEM._replace(outer_loss=outer_loss)
    step = jax.jit(partial(bilevel_step(estimator), problem))
    state, window = fresh(estimator, problem=problem), data(1)
    good = step(state, window, 0.1).memory
    after = step(state, window._replace(val=window.val * jnp.nan), 0.1)
    assert after.metadata["status"] == Status.NONFINITE_VAL_LOSS
    kept = split((after.memory, good if moves else state.memory))[0]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, *split((good, state.memory))[0])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("side, code", [("train", 1), ("val", 2)])
def test_nan_in_a_batch_is_reported_and_undone(name, side, code):
    estimator = ESTIMATORS[name]
    outer = optax.adam(1e-2)
    step = jax.jit(partial(bilevel_step(estimator, outer), PROBLEM))
    windows = in_windows(data(3 * T), estimator.unroll_steps)
    good = [jax.tree.map(lambda x: x[i], windows) for i in range(3)]  # noqa: B023
    state = step(fresh(estimator, outer), good[0])
    bad = good[1]._replace(**{side: getattr(good[1], side).at[-1, 0, 0].set(jnp.nan)})
    after = step(state, bad)
    assert after.metadata["status"] == code
    assert after.metadata["n_rejected"] == 1 and after.metadata["first_bad_step"] == 1
    for a, b in zip(
        jax.tree.leaves((state.hyperparams, state.outer_opt_state)),
        jax.tree.leaves((after.hyperparams, after.outer_opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    if side == "train":
        np.testing.assert_array_equal(after.params["w"], state.params["w"])
    else:  # training itself was fine
        assert not np.array_equal(after.params["w"], state.params["w"])
    assert int(after.step) == 2
    recovered = step(step(after, good[2]), bad)
    assert recovered.metadata["n_rejected"] == 2
    assert recovered.metadata["first_bad_step"] == 1  # sticky
    recovered = step(recovered, good[0])
    assert recovered.metadata["status"] == Status.OK
    assert bool(tree_is_finite((recovered.params, recovered.hyperparams)))


@pytest.mark.parametrize("code", Status)
def test_a_code_says_what_is_rejected(code):
    """`rejects` and `explains` against what the guard does after an estimate that ends so."""
    reported = not code.name.startswith("NONFINITE")  # by the method; the others by the guard

    def nan_if(*codes):
        return jnp.where(jnp.array(code in codes), jnp.nan, 1.0)

    def estimate(problem, memory, inner, lam, window):
        inner = inner._replace(params=inner.params + nan_if(Status.NONFINITE_TRAIN_STATE))
        explained = [c for c in Status if c.explains]
        h = nan_if(Status.NONFINITE_HYPERGRAD, *explained)
        info = report(nan_if(Status.NONFINITE_VAL_LOSS), h)
        return Estimate(h, inner, memory + 1, {**info, "status": jnp.int32(code * reported)})

    estimator = Estimator(lambda *args: jnp.zeros(()), estimate)
    problem = BilevelProblem(from_update(lambda w, lam, batch: w), lambda w, lam, batch: w)
    state = init_state(problem, estimator, None, jnp.zeros(()), jnp.zeros(()))
    rate = jnp.inf if code == Status.NONFINITE_HYPERPARAMS else 1.0
    step = jax.jit(partial(bilevel_step(estimator), problem))
    after = step(state, Window(jnp.zeros(1), jnp.zeros(1)), jnp.asarray(rate))
    assert after.metadata["status"] == code
    assert (after.hyperparams == 0) == code.rejects
    assert after.metadata["n_rejected"] == code.rejects
    forgotten = {
        Status.NONFINITE_TRAIN_STATE,
        Status.NONFINITE_VAL_LOSS,
        Status.NONFINITE_HYPERGRAD,
    }
    assert (after.memory == 0) == (code in forgotten)


@pytest.mark.parametrize("eps_root, code", [(0.0, Status.NONFINITE_HYPERGRAD), (1e-8, Status.OK)])
def test_a_dead_feature_under_adam(eps_root, code):
    """A5: the square root at zero; the losses are finite, the hypergradient is not."""

    def loss(w, lam, batch):
        return jnp.sum(batch * (jnp.exp(lam) * (w - 1) ** 2 + w**4))

    problem = BilevelProblem(
        from_optax(loss, optax.adam(0.1, eps_root=eps_root)), lambda w, lam, v: jnp.sum(w**2)
    )
    lam, window = jnp.array(0.3), Window(jnp.array([[1.0, 0.0]]), jnp.zeros(1))
    state = init_state(problem, one_step(), None, jnp.array([-1.0, 0.0]), lam)
    step = jax.jit(partial(bilevel_step(one_step()), problem))
    after = step(step(state, window, 1.0), window, 1.0)  # the first step of Adam is a sign
    assert after.metadata["status"] == code
    assert (after.hyperparams == lam) == (code != Status.OK)
    assert float(after.params[0]) > -0.85 and float(after.params[1]) == 0.0  # training went on


def test_an_outer_overflow_is_undone():
    state, window = fresh(one_step()), data(1)
    step = jax.jit(partial(bilevel_step(one_step()), PROBLEM))  # a traced rate is not looked at
    after = step(state, window, jnp.inf)
    assert after.metadata["status"] == Status.NONFINITE_HYPERPARAMS
    np.testing.assert_array_equal(after.hyperparams["rate"], LAM["rate"])
    for rate in (np.nan, 3e38):
        after = step(state, Window(window.train * 100, window.val), rate)
        assert bool(tree_is_finite(after.hyperparams))


def test_a_nan_in_model_state_is_undone():
    """Batch statistics are part of what a bad batch must not poison."""

    def step(inner, lam, batch):
        w = inner.params - lam * (inner.params - jnp.nan_to_num(batch))
        return inner._replace(params=w, model_state=0.5 * inner.model_state + 0.5 * batch)

    dynamics = Dynamics(lambda w, lam: InnerState(w, (), jnp.zeros(())), step)
    problem = BilevelProblem(dynamics, lambda w, lam, v, statistics: (w - v) ** 2)
    state = init_state(problem, one_step(), None, jnp.array(1.0), jnp.array(0.1))
    after = bilevel_step(one_step())(
        problem, state, Window(jnp.array([jnp.nan]), jnp.zeros(1)), 0.1
    )
    assert np.isfinite(after.model_state)
    assert after.metadata["status"] == Status.NONFINITE_TRAIN_STATE


def test_a_diverging_inner_loop_never_moves_lam_to_nan():
    """lr = e^400, an outer rate of 1, twenty steps."""
    lam = {"rate": jnp.array(400.0), "scale": jnp.array(0.1)}
    for name in ("one_step", "hyperdistill", "greedy", "reverse"):
        estimator = ESTIMATORS[name]
        state = init_state(PROBLEM, estimator, None, PARAMS, lam, data(estimator.unroll_steps))
        episode = jax.jit(partial(run_episode, estimator, None, PROBLEM))
        for _ in range(2):
            state = episode(state, data(T), 1.0)
        assert bool(tree_is_finite((state.params, state.hyperparams))), name
        assert int(state.metadata["n_rejected"]) > 0 and int(state.metadata["first_bad_step"]) >= 0
