"""init, step, compute_hypergradient and run of every class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import (
    ANY_STEP,
    KINDS,
    METHODS,
    Source,
    T,
    batch,
    floats,
    method,
    run,
    sgd,
    start,
    step,
    train_loss,
    update_fn,
    val_loss,
)

from gradhpo import GradhpoWarning, Resident, greedy, one_step, reverse
from gradhpo.testing import assert_trees_close

ALL = pytest.mark.parametrize("name", METHODS)
EVERY_KIND = pytest.mark.parametrize("name", KINDS)


@pytest.mark.parametrize("name", ANY_STEP)
def test_both_ways_of_training_agree_for_sgd(name, x64):
    """update_fn and inner_optimizer: the same run, in float64."""
    own = run(method(name), method(name).init(*start(jnp.float64, name)), dtype=np.float64)
    optax_way = method(name, inner_optimizer=sgd)
    other = run(optax_way, optax_way.init(*start(jnp.float64, name)), dtype=np.float64)
    assert_trees_close(floats(other), floats(own), 1e-8 if name.startswith("t1t2") else 1e-11)
    for key in ("train_loss", "val_loss", "hypergrad_norm", "direct_norm"):
        np.testing.assert_allclose(other.metadata[key], own.metadata[key], rtol=1e-7, err_msg=key)


# Not the methods of the minimum: to them a velocity in the weights is one of them.
SLOTS = [name for name in ANY_STEP if not name.startswith(("implicit", "so", "amigo", "stocbio"))]


def momentum_update(s, lam, batch):
    gradient = jax.grad(train_loss)({"w": s["w"]}, lam, batch)["w"]
    v = 0.9 * s["v"] + gradient
    rate = jnp.exp(jnp.sum(lam["rate"]))
    return {"w": s["w"] - rate * v, "v": v, "count": s["count"] + 1}


def momentum_sgd(lam):
    return optax.sgd(jnp.exp(jnp.sum(lam["rate"])), momentum=0.9)


def with_slots(dtype, name=None):
    params, lam = start(dtype, name)
    return {**params, "v": jnp.zeros(2, dtype), "count": jnp.zeros((), jnp.int32)}, lam


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.filterwarnings("ignore:.*no gradient path to params leaf")  # see the next test
def test_slots_inside_params_are_slots_outside(name, x64):
    """Momentum as an update_fn with an integer count beside it. One episode: `run` gives Optax
    fresh slots in the next, while an update_fn's own are part of its weights."""
    params, lam = start(jnp.float64, name)
    own = method(name, update_fn=momentum_update)
    got = run(own, own.init(*with_slots(jnp.float64, name)), M=1, dtype=np.float64)
    outside = method(name, inner_optimizer=momentum_sgd)
    want = run(outside, outside.init(params, lam), M=1, dtype=np.float64)
    rtol = 1e-8 if name.startswith("t1t2") else 1e-11
    assert_trees_close(got.hyperparams, want.hyperparams, rtol)
    np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=rtol)
    assert got.params["count"] == T and got.params["count"].dtype == jnp.int32


def test_slots_inside_params_are_no_mistake():
    """`from_update` tells the user to put them there: no warning, no error if strict."""
    opt = method("one_step", update_fn=momentum_update, strict=True)
    step(opt, opt.init(*with_slots(jnp.float32)))


@ALL
def test_compute_hypergradient_is_what_step_applies(name):
    """With a plain outer step of rate 1; on a fresh state, and later."""
    opt = method(name)
    state = opt.init(*start(name=name))
    for seed in (0, 1):
        h = opt.compute_hypergradient(state, batch(seed), batch(seed + 100), train_loss, val_loss)
        after = step(opt, state, seed, lr_hyper=1.0)
        want = jax.tree.map(lambda a, b: a - b, state.hyperparams, after.hyperparams)
        assert_trees_close(h, want, 1e-5)  # a difference of numbers of size 2, in float32
        assert float(optax.tree.norm(h)) > 1e-2
        np.testing.assert_allclose(after.metadata["hypergrad_norm"], optax.tree.norm(h), rtol=1e-6)
        state = after
    assert int(state.step) == 2


@pytest.mark.parametrize(
    "name, pure", [("one_step", one_step()), ("reverse", reverse(T)), ("greedy", greedy(0.9, 2))]
)
def test_step_repeats_its_batch_over_the_window(name, pure):
    from gradhpo import BilevelProblem, Window, from_update

    opt, (params, lam) = method(name), start()
    h = opt.compute_hypergradient(opt.init(params, lam), batch(0), batch(1), train_loss, val_loss)
    problem = BilevelProblem(from_update(update_fn), val_loss)
    window = Window(*(jnp.stack([batch(i)] * pure.unroll_steps) for i in (0, 1)))
    inner = problem.dynamics.init(params, lam)
    assert_trees_close(h, pure.estimate(problem, (), inner, lam, window).hypergrad, 1e-6)


# -- run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_step", "t1t2_averaged", "hyperdistill", "rtho", "saba"])
def test_run_is_a_loop_of_steps(name):
    """One episode by `run` and by hand through start_episode, step, end_episode; for methods of
    one step per window: step repeats its batch over one, run draws a batch for every step."""
    opt = method(name, **({"theta": "fixed"} if name == "hyperdistill" else {}))
    got = run(opt, opt.init(*start()), M=2, lr_reptile=0.25)
    train, val = Source(1), Source(2)
    state = opt.init(*start(), train_batch=batch(0))
    for m in range(2):
        state = opt.start_episode(state)
        for _ in range(T):
            state = opt.step(
                state, train(), val(), train_loss, val_loss, lr_hyper=0.1 * (1 - m / 2)
            )
        state = opt.end_episode(state, 0.25)
    assert_trees_close(floats(got), floats(state), 2e-6)
    assert int(got.step) == int(state.step) == 2 * T


@EVERY_KIND
def test_callbacks_count_from_one_and_see_w_T(name):
    opt, seen = method(name), []
    state = opt.init(*start())
    got = run(opt, state, M=3, lr_reptile=0.0, callback=lambda m, s: seen.append((m, s)))
    assert [m for m, _ in seen] == [1, 2, 3]
    per_episode = T // opt.estimator().unroll_steps
    assert [int(s.step) for _, s in seen] == [per_episode, 2 * per_episode, 3 * per_episode]
    np.testing.assert_array_equal(got.params["w"], state.params["w"])  # phi, restarted
    for _, s in seen:  # every one still valid, and w_T, not phi
        assert np.all(np.asarray(s.params["w"]) != np.asarray(state.params["w"]))
    np.testing.assert_array_equal(got.hyperparams["rate"], seen[-1][1].hyperparams["rate"])
    last = []
    got = run(opt, state, M=2, callback=lambda m, s: last.append(s))
    assert not any(
        x.is_deleted() for x in jax.tree.leaves(last)
    )  # the next episode donates its own
    np.testing.assert_array_equal(got.params["w"], last[-1].params["w"])


@ALL
def test_what_was_passed_in_stays_valid(name):
    """`run` donates its own copy only, also of a method's memory; `step` donates nothing."""
    opt, (params, lam) = method(name), start(name=name)
    state = opt.init(params, lam)
    kept = jax.tree.map(np.array, (params, lam, state.params, state.hyperparams))
    first = run(opt, state)
    again = run(opt, state)
    stepped = step(opt, state)
    step(opt, state), step(opt, stepped), run(opt, first)
    for a, b in zip(
        jax.tree.leaves(kept),
        jax.tree.leaves((params, lam, state.params, state.hyperparams)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(floats(first)), jax.tree.leaves(floats(again)), strict=True):
        np.testing.assert_array_equal(a, b)  # the same seed, the same bits


def test_another_seed_is_another_run():
    runs = []
    for seed in (0, 1):
        opt = method("hyperdistill", seed=seed, theta="fixed")
        runs.append(run(opt, opt.init(*start())).hyperparams)
    assert float(runs[0]["scale"]) != float(runs[1]["scale"])


def test_all_methods_draw_the_same_batches_in_the_same_order(monkeypatch):
    logs = {}
    for name in KINDS:
        log, opt = [], method(name)

        def logged(side, log=log):
            source = Source(side)

            def get():
                log.append((side, source.calls))
                return source()

            return get

        state = opt.init(*start())
        assert log == []
        run(opt, state, M=2, get_train_batch=logged(1), get_val_batch=logged(2))
        logs[name] = log
    assert all(log == [(side, t) for t in range(2 * T) for side in (1, 2)] for log in logs.values())

    drawn, indices = {}, Resident.indices
    data = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    for name in KINDS:
        seen = drawn[name] = []
        monkeypatch.setattr(
            Resident,
            "indices",
            lambda self, *a, seen=seen, **k: (seen.append(indices(self, *a, **k)), seen[-1])[1],
        )
        opt, source = method(name), Resident(data, 3, seed=5)
        state = opt.init(*start())
        for _ in range(2):  # a second run goes on, for every method alike
            state = run(opt, state, M=2, get_train_batch=source, get_val_batch=Source(2))
    for name in KINDS:
        np.testing.assert_array_equal(drawn[name], drawn["fo"], err_msg=name)
    flat = [x.tobytes() for x in drawn["fo"]]
    assert len(set(flat)) == len(flat) == 4  # no episode twice


def test_a_source_with_a_data_attribute_is_still_a_function():
    """A loader object holds its data somewhere; only a Resident is gathered from."""

    class Loader(Source):
        data = np.zeros((7, 2), np.float32)

    opt = method("one_step")
    state = opt.init(*start())
    got = run(opt, state, get_train_batch=Loader(1), get_val_batch=Loader(2))
    assert_trees_close(floats(got), floats(run(opt, state)), 1e-7)


@pytest.mark.parametrize("name", ["fo", "greedy", "reverse", "hyperdistill"])
def test_loops_are_a_setting(name, x64):
    """scan, unroll and host: the same numbers through the whole of `run`."""
    results = {}
    for loop in ("scan", "unroll", "host"):
        opt = method(name, loop=loop)
        results[loop] = run(opt, opt.init(*start(jnp.float64)), dtype=np.float64, lr_reptile=0.5)
    for loop in ("unroll", "host"):
        assert_trees_close(floats(results[loop]), floats(results["scan"]), 1e-11)


def test_a_run_that_meets_nan_says_so_and_goes_on():
    """Row 36: one bad batch of eight; sticky step, hyperparameters finite."""

    class Poisoned(Source):
        def __call__(self):
            value = super().__call__()
            return value * np.nan if self.calls == 3 else value

    for name in KINDS:
        opt = method(name)
        with pytest.warns(GradhpoWarning, match=r"1 of the \d updates of this run were rejected"):
            state = run(opt, opt.init(*start()), get_train_batch=Poisoned(1))
        assert int(state.metadata["n_rejected"]) == 1, name
        assert int(state.metadata["first_bad_step"]) == 2 // opt.estimator().unroll_steps, name
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(floats(state))), name
        assert np.all(np.asarray(state.hyperparams["scale"]) != np.float32(0.1)), name


def test_adam_without_eps_root_has_a_status_that_names_it():
    from gradhpo import status_message

    def loss(w, lam, batch):
        return jnp.sum(batch * (w["w"] - 1) ** 2) * jnp.exp(lam["scale"]) + 0 * lam["rate"]

    opt = method("one_step", inner_optimizer=optax.adam(0.1))
    dead = np.array([[1.0, 0.0]], np.float32)
    state = opt.step(opt.init(*start()), dead, batch(0), loss, val_loss, lr_hyper=0.1)
    assert "eps_root" in status_message(state.metadata["status"])
    assert float(state.hyperparams["scale"]) == np.float32(0.1)


def test_counters_saturate():
    """Row 45."""
    opt = method("one_step")
    state = opt.init(*start()).update(step=2**31 - 2)
    for _ in range(3):
        state = step(opt, state)
    assert int(state.step) == 2**31 - 1
    assert int(run(opt, state, M=1).step) == 2**31 - 1
