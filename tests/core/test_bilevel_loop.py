"""The outer update, episodes and runs: equal under every transformation, and NaN-proof."""

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
    train_loss,
    val_loss,
    what_counts,
)

from gradhpo import (
    BilevelProblem,
    Window,
    bilevel_step,
    from_optax,
    from_update,
    greedy,
    hyperdistill,
    init_state,
    linear_decay,
    one_step,
    reverse,
    run_episode,
    run_episodes,
)
from gradhpo.core.episode import end_episode, in_windows, start_episode
from gradhpo.core.inspect import has_convolution
from gradhpo.testing import assert_trees_close
from gradhpo.utils._partition import split


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scan_jit_and_vmap_are_the_plain_loop(name):
    estimator = ESTIMATORS[name]
    outer = optax.adam(1e-2)
    step = partial(bilevel_step(estimator, outer), PROBLEM)
    windows = in_windows(data(T), estimator.unroll_steps)
    start = fresh(estimator, outer)
    plain = start
    for i in range(T // estimator.unroll_steps):
        plain = step(plain, jax.tree.map(lambda x: x[i], windows))  # noqa: B023
    scanned, _ = jax.jit(partial(jax.lax.scan, lambda s, w: (step(s, w), None)))(start, windows)
    rtol = 1e-3 if name == "finite_difference" else 2e-5  # differences in float32
    assert_trees_close(what_counts(scanned), what_counts(plain), rtol)
    assert int(scanned.step) == T // estimator.unroll_steps

    first = jax.tree.map(lambda x: x[0], windows)
    states = [start.update(params={"w": PARAMS["w"] * k}) for k in (1.0, 2.0, 3.0)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    mapped = jax.jit(jax.vmap(step, in_axes=(0, None)))(stacked, first)
    jitted = jax.jit(step)
    loop = [what_counts(jitted(s, first)) for s in states]
    want = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    assert_trees_close(what_counts(mapped), want, rtol)


@pytest.mark.parametrize("name", ["one_step", "hyperdistill"])
@pytest.mark.parametrize("lr_reptile", [1.0, 0.25])
def test_run_episodes_is_the_loop_of_run_episode(name, lr_reptile):
    estimator, M, period = ESTIMATORS[name], 3, 2
    windows = data(M, T)
    rates = linear_decay(0.1, M)
    got, history = jax.jit(
        partial(
            run_episodes, estimator, None, PROBLEM, lr_reptile=lr_reptile, estimation_period=period
        )
    )(fresh(estimator), windows, rates)

    state, seen = fresh(estimator), []
    for m in range(M):
        window = jax.tree.map(lambda x: x[m], windows)  # noqa: B023
        if estimator.start is not None and m % period == 0:
            inner = PROBLEM.dynamics.init(state.params, state.hyperparams)
            memory = estimator.start(PROBLEM, state.memory, inner, state.hyperparams, window)
            state = state.update(memory=memory)
        state = run_episode(estimator, None, PROBLEM, state, window, rates[m], keep_phi=True)
        seen.append(state.metadata["val_loss"])
        state = end_episode(state, lr_reptile)
    assert_trees_close(what_counts(got), what_counts(state), 5e-6)
    np.testing.assert_allclose(history["val_loss"], seen, rtol=1e-5)
    assert int(got.step) == M * T and got.phi == ()


def test_resident_indices_are_the_batches():
    estimator, data_set = (
        one_step(),
        jnp.asarray(np.random.default_rng(1).standard_normal((9, 2)), jnp.float32),
    )
    indices = Window(jnp.array([[0, 3, 8]] * T), jnp.array([[1, 2, 2]] * T))
    resident = Window(data_set, data_set)
    a = run_episode(estimator, None, PROBLEM, fresh(estimator), indices, 0.1, resident=resident)
    batches = Window(data_set[indices.train], data_set[indices.val])
    b = run_episode(estimator, None, PROBLEM, fresh(estimator), batches, 0.1)
    assert_trees_close(what_counts(a), what_counts(b), 1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("estimator, sides", [(reverse(8), 1), (greedy(0.9, 8), 2)])
def test_resident_batches_that_nobody_reads_are_not_gathered(estimator, sides, x32):
    """Reverse mode reads one of T validation batches: the program has room for T of one side."""
    wide, rows = jax.ShapeDtypeStruct((100, 5000), jnp.float32), np.zeros((8, 10), np.int32)

    def square(w, lam, batch):
        return jnp.mean((batch @ w) ** 2) + lam * jnp.vdot(w, w)

    problem = BilevelProblem(from_optax(square, optax.sgd(0.1)), square)

    def episode(window, resident):
        state = init_state(problem, estimator, None, jnp.ones(5000), jnp.ones(()))
        return run_episode(estimator, None, problem, state, window, 0.1, resident=resident)

    program = jax.jit(episode).lower(Window(rows, rows), Window(wide, wide)).compile()
    batches = rows.size * 5000 * 4
    temp = program.memory_analysis().temp_size_in_bytes
    assert sides * batches <= temp < (sides + 0.5) * batches


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_reptile_is_exact_at_its_ends(rate):
    state = fresh(one_step())
    begun = start_episode(one_step(), PROBLEM, state).state
    moved = begun.update(params={"w": jnp.array([3.1, 0.7])})
    got = end_episode(moved, rate).params["w"]
    want = (1 - rate) * PARAMS["w"] + rate * moved.params["w"]
    np.testing.assert_array_equal(got, np.asarray(want))
    assert end_episode(moved, rate).phi == ()


def test_an_episode_starts_with_fresh_slots_and_memory():
    estimator = ESTIMATORS["hyperdistill"]
    state = run_episode(estimator, None, PROBLEM, fresh(estimator), data(T), 0.1)
    assert float(state.memory.weight) > 3 and np.any(state.inner_opt_state[0].trace["w"])
    state = state.update(memory=state.memory._replace(theta=jnp.float32(0.3)))
    begun = start_episode(estimator, PROBLEM, state).state
    assert float(begun.memory.weight) == 0 and not np.any(begun.inner_opt_state[0].trace["w"])
    assert float(begun.memory.theta) == np.float32(0.3)
    assert int(begun.step) == T and int(begun.memory.draws) == int(state.memory.draws)


def test_the_users_own_metadata_is_carried_through_a_scan():
    estimator = one_step()
    state = fresh(estimator).update(metadata={"note": jnp.array(3.0)})
    state = run_episode(estimator, None, PROBLEM, state, data(T), 0.1)
    assert state.get_metric("note") == 3.0


def test_metrics_are_those_of_the_step():
    """train_loss before the step, val_loss after it, norms of the two terms."""
    state, window = fresh(one_step()), data(1)
    after = bilevel_step(one_step())(PROBLEM, state, window, 0.1)
    got = one_step().estimate(PROBLEM, (), state.inner, LAM, window)
    np.testing.assert_allclose(
        after.metadata["train_loss"], train_loss(PARAMS, LAM, window.train[0]), rtol=1e-6
    )
    np.testing.assert_allclose(
        after.metadata["val_loss"], val_loss(after.params, LAM, window.val[0]), rtol=1e-6
    )
    np.testing.assert_allclose(
        after.metadata["hypergrad_norm"], optax.tree.norm(got.hypergrad), rtol=1e-6
    )
    np.testing.assert_allclose(after.metadata["direct_norm"], 0.02, rtol=1e-6)
    for name, h in got.hypergrad.items():
        np.testing.assert_allclose(after.hyperparams[name], LAM[name] - 0.1 * h, rtol=1e-6)


# -- how a loop runs (A9) ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [greedy, hyperdistill, reverse], ids=lambda f: f.__name__)
def test_every_loop_gives_the_same_numbers(make, x64):
    numbers = {}
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (PARAMS, LAM, data(T)))
    for loop in ("scan", "unroll", "host"):
        settings = {"unroll_steps": T} if make is not hyperdistill else {}
        estimator = make(loop=loop, **settings)
        params, lam, window = wide
        inner = PROBLEM.dynamics.init(params, lam)
        memory = estimator.init(inner, lam, window)
        if estimator.start is not None:
            memory = estimator.start(PROBLEM, memory, inner, lam, window)
        last = jax.tree.map(lambda x: x[-estimator.unroll_steps :], window)  # noqa: B023
        got = estimator.estimate(PROBLEM, memory, inner, lam, last)
        theta = memory.theta if make is hyperdistill else got.info["val_loss"]
        numbers[loop] = got.hypergrad, split(tuple(got.inner))[0], theta
    assert_trees_close(numbers["unroll"], numbers["scan"], 1e-12)
    assert_trees_close(numbers["host"], numbers["scan"], 1e-12)


def convolve(w, x):
    return jax.lax.conv(x, w, (1, 1), "SAME")


def conv_loss(w, lam, batch):
    return jnp.mean(convolve(w, batch) ** 2) * lam


@pytest.mark.parametrize(
    "dynamics, want",
    [
        (from_optax(conv_loss, optax.sgd(0.1)), True),
        (from_update(lambda w, lam, b: w - lam * jax.grad(conv_loss)(w, lam, b)), True),
        (
            from_update(
                jax.jit(lambda w, lam, b: w - lam * jax.grad(jax.checkpoint(conv_loss))(w, lam, b))
            ),
            True,
        ),
        (
            from_update(
                lambda w, lam, b: jax.lax.cond(
                    lam > 0, lambda: w + convolve(w, b).mean(), lambda: w
                )
            ),
            True,
        ),
        (from_optax(lambda w, lam, b: jnp.sum(w**2) * lam, optax.sgd(0.1)), False),
    ],
    ids=["optax", "update_fn", "jit + checkpoint", "cond", "none"],
)
def test_convolutions_are_found_wherever_they_hide(dynamics, want):
    w, x, lam = jnp.ones((1, 1, 3, 3)), jnp.ones((1, 1, 5, 5)), jnp.array(0.5)
    problem = BilevelProblem(dynamics, lambda w, lam, b: jnp.sum(w))
    assert has_convolution(problem, dynamics.init(w, lam), lam, x) is want
