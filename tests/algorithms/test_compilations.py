"""One program per input shape: counted where XLA compiles."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import (
    ANY_STEP,
    KINDS,
    METHODS,
    T,
    batch,
    method,
    run,
    start,
    step,
    train_loss,
    val_loss,
)

ALL = pytest.mark.parametrize("name", METHODS)
EVERY_KIND = pytest.mark.parametrize("name", KINDS)


@ALL
def test_a_second_run_compiles_nothing(name, compilations):
    """Another outer rate, other episodes, other values: the same programs."""
    opt = method(name)
    state = opt.init(*start(name=name))
    got = run(opt, state, M=2, lr_reptile=0.5)
    before = compilations()
    run(opt, got, M=5, lr_hyper=0.03, lr_reptile=0.25)
    run(opt, opt.init(*start(name=name)), M=3, lr_hyper=np.float32(1e-3), lr_reptile=0.5)
    assert compilations() == before


@EVERY_KIND
def test_episodes_do_not_compile(name, compilations):
    """A run of 6 episodes needs as many programs as a run of 1."""
    counts = []
    for M in (1, 1, 6):
        opt = method(name, outer_optimizer=optax.sgd(0.1))  # a new object: new programs
        state = opt.init(*start())
        before = compilations()
        run(opt, state, M=M)
        counts.append(compilations() - before)
    assert counts[1] == counts[2] <= counts[0] <= 3, counts  # the copy, theta, the episode


@EVERY_KIND
def test_a_hundred_steps_compile_once(name, compilations):
    opt = method(name)
    state = step(opt, opt.init(*start(), train_batch=batch(0)))
    state = step(opt, state)
    before = compilations()
    for i in range(100):
        state = step(opt, state, seed=i % 3, lr_hyper=0.01 / (i + 1))
    assert compilations() == before
    assert int(state.step) == 102


def test_ten_compilations_from_the_constructor_on(compilations):
    opt = method("hyperdistill", T=20, estimation_period=10)
    params, lam = start()
    before = compilations()
    run(opt, opt.init(params, lam), M=60)
    assert compilations() - before <= 10


def test_equal_settings_share_programs(compilations):
    state = method("hyperdistill").init(*start())
    run(method("hyperdistill"), state)
    before = compilations()
    run(method("hyperdistill"), state)
    assert compilations() == before
    assert method("hyperdistill") == method("hyperdistill")
    assert hash(method("greedy")) == hash(method("greedy", gamma=jnp.float32(0.5).item() + 0.4))


def test_python_numbers_and_arrays_are_one_program(compilations, x32):
    """Weak types: 0.1, np.float32(0.1) and jnp.array(0.1) as hyperparameters and rates."""
    opt = method("one_step")
    params, _ = start()
    lams = [
        {"rate": -2.0, "scale": 0.1},
        {"rate": np.float32(-2.0), "scale": jnp.asarray(0.1)},
        {"rate": jnp.float32(-2.0), "scale": jnp.float32(0.1)},
    ]
    states = [opt.init(params, lam) for lam in lams]
    for state in states:
        assert not any(x.aval.weak_type for x in jax.tree.leaves(state))
    first = step(opt, step(opt, states[0]))
    assert not any(x.aval.weak_type for x in jax.tree.leaves(first))
    before = compilations()
    ends = []
    for state, rate in zip(states, (0.1, np.float64(0.1), jnp.float32(0.1)), strict=True):
        after = step(opt, step(opt, state, lr_hyper=rate), lr_hyper=1)
        ends.append(float(after.hyperparams["rate"]))
    assert compilations() == before
    assert ends[0] == ends[1] == ends[2] != -2.0  # one program, the same numbers: the same bits


# -- under the user's own transformations (row 59) ---------------------------------------------


@EVERY_KIND  # of every estimator: tests/testing/test_conformance.py
def test_jit_vmap_and_scan_over_step(name, compilations):
    opt = method(name)
    state = opt.init(*start(), train_batch=batch(0))
    batches = np.stack([batch(i) for i in range(3)])

    def one(state, x):
        return opt.step(state, x, x, train_loss, val_loss, lr_hyper=0.1)

    loop = state
    for x in batches:
        loop = one(loop, x)

    def close(a, b):
        for x, y in zip(
            *map(jax.tree.leaves, ((a.params, a.hyperparams), (b.params, b.hyperparams))),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)

    scanned, _ = jax.lax.scan(lambda s, x: (one(s, x), None), state, batches)
    close(scanned, loop)
    jitted = jax.jit(one)
    close(jitted(jitted(jitted(state, batches[0]), batches[1]), batches[2]), loop)
    tasks = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    mapped = jax.vmap(one)(tasks, batches[:2])
    for i in range(2):
        close(jax.tree.map(lambda x: x[i], mapped), one(state, batches[i]))  # noqa: B023


def test_tracing_hyperdistill_without_a_batch_is_explained():
    opt = method("hyperdistill")
    state = opt.init(*start())
    x = batch(0)
    with pytest.raises(ValueError, match=r"init\(params, hyperparams, train_batch\)"):
        jax.jit(lambda s: opt.step(s, x, x, train_loss, val_loss, lr_hyper=0.1))(state)
    # Not traced, the memory is allocated at the first step.
    after = step(opt, state)
    assert after.memory.data.shape == x.shape


# -- dtypes follow the inputs (row 55) -------------------------------------------------------------


@pytest.mark.parametrize(
    "name, outer",
    [*((name, None) for name in METHODS), *((name, optax.adam(0.01)) for name in KINDS)],
    ids=[*METHODS, *(f"{name} with adam" for name in KINDS)],
)
def test_a_float32_problem_stays_float32_under_x64(name, outer, x64):
    opt = method(name, outer_optimizer=outer)
    state = opt.init(*start(jnp.float32, name))
    after = run(opt, step(opt, state), M=1)
    for tree in (after.params, after.hyperparams, after.inner_opt_state, after.metadata):
        for leaf in jax.tree.leaves(tree):
            assert leaf.dtype in (jnp.float32, jnp.int32), leaf
    assert after.step.dtype == jnp.int32
    h = opt.compute_hypergradient(after, batch(0), batch(1), train_loss, val_loss)
    assert {x.dtype for x in jax.tree.leaves(h)} == {jnp.dtype("float32")}


def test_python_numbers_in_batches_are_not_wider_in_run(x64):
    """step and run take the same batches: a float beside float32 arrays stays weak."""

    def loss(w, lam, batch):
        x, scale = batch
        return scale * train_loss(w, lam, x)

    def judge(w, lam, batch):
        return val_loss(w, lam, batch[0])

    def get():
        return batch(0), 0.5

    opt = method("one_step", inner_optimizer=optax.sgd(0.1))
    state = opt.init(*start(jnp.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = opt.step(state, get(), get(), loss, judge, lr_hyper=0.1)
        b = run(opt, state, M=1, T=1, get_train_batch=get, get_val_batch=get, losses=(loss, judge))
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-6)


@pytest.mark.parametrize("name", ANY_STEP)
def test_bfloat16_weights(name):
    """A smoke test of dtypes: bfloat16 weights with float32 hyperparameters."""

    def narrow(w, lam, batch):
        gradient = jax.grad(train_loss)(w, lam, batch.astype(jnp.bfloat16))["w"]
        rate = jnp.exp(jnp.sum(lam["rate"])).astype(jnp.bfloat16)
        return {"w": w["w"] - rate * gradient.astype(jnp.bfloat16)}

    params, lam = start(name=name)
    params = {"w": params["w"].astype(jnp.bfloat16)}
    opt = method(name, update_fn=narrow)
    after = run(opt, opt.init(params, lam), M=1)
    assert after.params["w"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(after.hyperparams)} == {jnp.dtype("float32")}
    assert int(after.metadata["n_rejected"]) == 0
    wide = method(name)
    want = run(wide, wide.init(*start(name=name)), M=1)
    for key in lam:
        np.testing.assert_allclose(after.hyperparams[key], want.hyperparams[key], atol=0.05)


def test_float64_without_x64_is_refused(x32):
    with pytest.raises(TypeError, match=r"\['w'\] of params is float64.*jax_enable_x64"):
        method("fo").init({"w": np.ones(2)}, {"rate": 0.1, "scale": 0.1})


def test_one_episode_is_one_length():
    opt = method("greedy", unroll_steps=2)
    assert int(run(opt, opt.init(*start()), M=1, T=6).step) == 3
    assert int(run(opt, opt.init(*start()), M=1).step) == T // 2
