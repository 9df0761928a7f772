"""Wrong use of the interface: faults 47 to 60 of docs/reliability.md.

Each is tried through every way into the library that it can come in by: the methods of a class,
`gradhpo.tune` and the functions below them. More cases of the classes are in tests/algorithms.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interface_cases import (
    CLASSES,
    DOORS,
    LOSSES,
    ONE_STEP,
    T,
    batch,
    by_run,
    by_step,
    method,
    rated,
    run,
    start,
    step,
    task,
    train_loss,
    val_loss,
)

import gradhpo as gh
from gradhpo import GradhpoWarning

DOOR = pytest.mark.parametrize("door", DOORS)

# -- 47 -------------------------------------------------------------------------------------------

NO_SCALARS = {
    "vector": (lambda w, lam, b: (w["w"] - b) ** 2, r"returned shape \(4, 2\).*jnp.mean"),
    "nothing": (lambda w, lam, b: None, "returned None.*`return` missing"),
    "three": (lambda w, lam, b: (jnp.mean(w["w"]), {}, w), r"\(loss, metrics\).*model_state"),
    "auxiliary": (lambda w, lam, b: (jnp.mean(w["w"]), w["w"]), "must be a dictionary of scalars"),
    "integer": (lambda w, lam, b: jnp.sum(w["w"] > 0), "returned int.*no gradient"),
    "dictionary": (lambda w, lam, b: {"loss": jnp.mean(w["w"])}, "floating-point scalar"),
}


@pytest.mark.filterwarnings("ignore::gradhpo.GradhpoWarning")  # of a loss without the weights
@pytest.mark.parametrize("name", ["es", "pes", "one_step"])
def test_47_a_loss_may_be_a_number_of_python(name):
    opt = method(name)
    state = step(opt, opt.init(*start()), (train_loss, lambda w, lam, batch: 1.0))
    assert float(state.metadata["val_loss"]) == 1.0 and not state.metadata["hypergrad_norm"]


@DOOR
@pytest.mark.parametrize("which", [0, 1], ids=["train_loss_fn", "val_loss_fn"])
def test_47_a_loss_that_is_no_scalar_says_what_it_returned(door, which):
    for loss, message in NO_SCALARS.values():
        losses = (loss, val_loss) if which == 0 else (train_loss, loss)
        with pytest.raises(TypeError, match=("train_loss_fn", "val_loss_fn")[which]) as caught:
            DOORS[door](losses)
        assert caught.match(f"(?s){message}")


# -- 48, 49 ---------------------------------------------------------------------------------------


def two_of_three(w, lam, batch):
    return train_loss(w, lam, batch)


LAM_OF_THREE = {**start()[1], "unused": np.float32(0.5)}


def test_48_a_hyperparameter_that_nothing_reads_is_named():
    message = r"leaf \['unused'\] is identically zero.*never move"
    for door in ("step", "tune"):
        with pytest.warns(GradhpoWarning, match=message) as caught:
            DOORS[door]((two_of_three, val_loss), lam=LAM_OF_THREE)
        assert len(caught) == 1
    for door in CLASSES:
        with pytest.raises(ValueError, match=message):
            DOORS[door]((two_of_three, val_loss), method(strict=True), lam=LAM_OF_THREE)


CUTS = {
    "stop_gradient": jax.lax.stop_gradient,
    "argmax": lambda w: jnp.argmax(w).astype(jnp.float32),
    "cast": lambda w: w.astype(jnp.int32).astype(jnp.float32),
}


@pytest.mark.parametrize("cut", CUTS)
def test_49_weights_that_the_loss_has_no_gradient_path_to_are_named(cut):
    def loss(w, lam, batch):
        return train_loss({"w": CUTS[cut](w["w"])}, lam, batch)

    for door in ("step", "tune"):
        with pytest.warns(GradhpoWarning, match=r"no gradient path to params leaf \['w'\]"):
            DOORS[door]((loss, val_loss))
    with pytest.raises(ValueError, match=r"no gradient path to params leaf \['w'\]"):
        by_step((loss, val_loss), method(strict=True))


# -- 50 to 53 -------------------------------------------------------------------------------------


@DOOR
@pytest.mark.parametrize("wrong", [jnp.int32(3), 2, True])
def test_50_whole_numbers_and_truth_values_are_no_hyperparameters(door, wrong):
    message = r"every hyperparameter must be floating point.*leaf \['scale'\] is (int|bool).*Cast"
    with pytest.raises(TypeError, match=message):
        DOORS[door](LOSSES, lam={**start()[1], "scale": wrong})


def test_50_nor_do_they_come_in_later():
    state = method().init(*start())
    with pytest.raises(TypeError, match=r"leaf \['scale'\] is int32 \(value 2\)"):
        state.update(hyperparams={**state.hyperparams, "scale": 2})


@pytest.mark.parametrize("inner", [rated, lambda lam: optax.adam(rated(lam), eps_root=1e-8)])
def test_51_whole_numbers_keys_and_missing_parts_of_the_weights_pass_through(inner):
    inner = rated if inner is rated else optax.adam(0.1, eps_root=1e-8)
    extra = {"count": jnp.int32(3), "on": True, "key": jax.random.key(1), "bias": None, "none": {}}
    opt = method(inner_optimizer=inner)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=GradhpoWarning)  # adam's rate is not tuned
        after = run(opt, opt.init({**start()[0], **extra}, start()[1])).params
    assert after["count"] == 3 and bool(after["on"]) is True
    assert after["bias"] is None and after["none"] == {}
    assert jax.random.key_data(after["key"]).tolist() == jax.random.key_data(extra["key"]).tolist()
    assert not np.array_equal(after["w"], start()[0]["w"])


def test_52_trees_that_do_not_match_show_the_first_path():
    opt, (params, lam) = method(), start()
    state = opt.init(params, lam)
    with pytest.raises(ValueError, match=r"params.*leaf \['w'\] against \['v'\]"):
        state.update(params={"v": params["w"]})
    with pytest.raises(ValueError, match=r"hyperparams.*leaf \['scale'\] is only in one"):
        state.update(hyperparams={"rate": lam["rate"]})
    more = method(update_fn=lambda w, lam, b: {**w, "x": w["w"]})
    with pytest.raises(ValueError, match=r"must keep its structure.*\['x'\]"):
        by_step(LOSSES, more)
    with pytest.raises(ValueError, match="space must be a tree like the hyperparameters"):
        task(space={"rate": gh.spaces.log(), "shape": gh.spaces.log()})
    of_adam = method(outer_optimizer=optax.adam(0.1))
    with pytest.raises(ValueError, match=r"another outer optimizer.*\.init\(|another outer"):
        step(of_adam, state)
    batches = iter([batch(0), (batch(0), batch(1))] * T)
    with pytest.raises(ValueError, match="get_train_batch.*must keep its structure"):
        run(opt, state, train=lambda: next(batches))


def test_53_weights_that_change_dtype_are_refused():
    def widened(w, lam, batch):
        return {"w": w["w"].astype(jnp.bfloat16)}

    for door in CLASSES:
        with pytest.raises(ValueError, match=r"\['w'\] went from float32\[2\] to bfloat16\[2\]"):
            DOORS[door](LOSSES, method(update_fn=widened))


def test_53_batches_that_change_shape_or_dtype_within_an_episode_are_refused():
    opt = method()
    for other, message in ((batch(0, 5), r"\(4, 2\) in batch 1 and \(5, 2\)"), (batch(0).astype(np.float16), "float32 in batch 1 and float16")):  # fmt: skip # noqa: E501
        batches = iter([batch(0), other] * T)
        with pytest.raises(ValueError, match=f"get_train_batch must return batches.*{message}"):
            run(opt, opt.init(*start()), train=lambda batches=batches: next(batches))


# -- 54 -------------------------------------------------------------------------------------------


def test_54_a_hundred_steps_of_every_kind_are_one_program(compilations):
    """More methods, rates and batches: tests/algorithms/test_compilations.py."""
    opt, losses = method(), LOSSES
    state = step(opt, opt.init(*start(), train_batch=batch(0)))
    opt.compute_hypergradient(state, batch(0), batch(1), *losses)
    run(opt, state, M=2)
    jitted = jax.jit(
        lambda state, x, rate: gh.bilevel_step(ONE_STEP)(POSED, state, gh.Window(x, x), rate)
    )
    functional = jitted(state.update(metadata={}), batch(0)[None], 0.1)
    before = compilations()
    for i in range(100):
        state = opt.step(state, batch(i), batch(i), *losses, lr_hyper=(0.1, 1, np.float64(0.2))[i % 3])  # fmt: skip # noqa: E501
        opt.compute_hypergradient(state, batch(i), batch(i), *losses)
        functional = jitted(functional, batch(i)[None], 0.1)
    run(opt, state, M=100)
    assert compilations() == before


POSED = gh.BilevelProblem(gh.from_optax(train_loss, rated), val_loss)


def test_54_what_changes_from_compilation_to_compilation_is_named():
    opt = method()
    state = opt.init(*start())
    with pytest.warns(GradhpoWarning, match="compiled 4 times, because val_loss_fn is a new") as w:
        for _ in range(5):
            fresh = (train_loss, lambda w, lam, b: val_loss(w, lam, b))
            jax.eval_shape(lambda state, fresh=fresh: step(opt, state, fresh), state)
    assert len(w) == 1


# -- 55 -------------------------------------------------------------------------------------------


@DOOR
def test_55_float64_that_is_switched_off_is_refused(door, x32):
    for wide in ({"params": {"w": np.ones(2)}}, {"lam": {"rate": np.ones(()), "scale": 0.1}}):
        with pytest.raises(TypeError, match=r"leaf \['\w+'\] of \w+ is float64.*jax_enable_x64"):
            DOORS[door](LOSSES, **wide)


@pytest.mark.parametrize("door", [*CLASSES, "tune"])
@pytest.mark.parametrize("which", [0, 1])
def test_55_and_so_is_a_loss_that_asks_for_it(door, which, x32):
    def wide(w, lam, batch):
        return LOSSES[which](w, lam, batch.astype(jnp.float64))

    losses = (wide, val_loss) if which == 0 else (train_loss, wide)
    name = ("train_loss_fn", "val_loss_fn")[which]
    with pytest.raises(TypeError, match=f"{name} asks for float64, but JAX.*jax_enable_x64"):
        DOORS[door](losses)


def test_55_numbers_too_large_for_the_integers_of_jax_are_refused(x32):
    with pytest.raises(ValueError, match=r"\['n'\] of params holds 1099511627776.*int32"):
        method().init({**start()[0], "n": np.int64(2**40)}, start()[1])
    pairs = [lambda w, lam, b, loss=loss: loss(w, lam, b[0]) for loss in LOSSES]
    opt = method()
    state = opt.init(*start())
    losses = dict(zip(("train_loss_fn", "val_loss_fn"), pairs, strict=True))
    refused = pytest.raises(ValueError, match=r"leaf \[1\] of \w+ holds 1099511627776.*int32")
    for large in (2**40, np.full(2, 2**40)):
        data = {"get_train_batch": lambda large=large: (batch(0), large)}
        with refused:
            opt.run(state, 1, **data, **losses, get_val_batch=lambda: (batch(1), 0), lr_hyper=0.1)
    with refused:
        opt.step(state, (batch(0), 2**40), (batch(1), 0), *pairs, lr_hyper=0.1)


def test_53_batches_of_narrow_floats_come_in_any_kind_of_array():
    opt = method()
    state = opt.init(*start())
    wide = [lambda w, lam, b, loss=loss: loss(w, lam, b.astype(float)) for loss in LOSSES]
    for kind in (np.asarray, jnp.asarray):
        narrow = [kind(jnp.bfloat16(x)) for x in (1.0, 2.0)]
        data = [lambda x=x: x for x in narrow]
        got = opt.run(
            state,
            1,
            get_train_batch=data[0],
            get_val_batch=data[1],
            train_loss_fn=wide[0],
            val_loss_fn=wide[1],
            lr_hyper=0.1,
        )
        assert np.isfinite(got.params["w"]).all()


def test_55_dtypes_follow_the_inputs_where_it_is_on(x64):
    for dtype in (np.float32, np.float64):
        state = by_run(LOSSES, params=start(dtype=dtype)[0], lam=start(dtype=dtype)[1])
        assert {x.dtype for x in jax.tree.leaves((state.params, state.hyperparams))} == {
            np.dtype(dtype)
        }


# -- 56 -------------------------------------------------------------------------------------------


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_56_a_state_may_be_used_again_and_a_donated_one_says_so():
    opt = method()
    state = step(opt, opt.init(*start()))
    for again in (step, run):
        same(again(opt, state), again(opt, state))
    jax.jit(lambda state: state.update(step=state.step + 1), donate_argnums=0)(state)
    calls = [
        lambda: step(opt, state),
        lambda: run(opt, state),
        lambda: opt.compute_hypergradient(state, batch(0), batch(1), *LOSSES),
        lambda: gh.tune(task(), ONE_STEP, episodes=1, T=2, lr_hyper=0.1, state=state),
        lambda: opt.init(state.params, start()[1]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"leaf .*\['w'\] of .*has been deleted.*donate"):
            call()


# -- 57, 58 ---------------------------------------------------------------------------------------


def test_57_keys_of_both_kinds_are_taken_and_one_key_is_one_draw():
    """A key in a batch or a model state is data: the same one draws the same numbers."""

    def noisy(w, lam, data, model_state):
        x, key = data
        x = x + 0.1 * jax.random.normal(key, x.shape)
        return train_loss(w, lam, x), (model_state, {})

    def judge(w, lam, data, model_state):
        return val_loss(w, lam, data[0])

    ends = []
    for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3), jax.random.key(4)):
        opt, (params, lam) = method(), start()
        data = batch(0), key
        state = opt.init({**params, "key": key}, lam, data, model_state={"key": key, "n": 0})
        after = opt.step(state, data, data, noisy, judge, lr_hyper=0.1)
        assert after.params["key"].dtype == key.dtype == after.model_state["key"].dtype
        ends.append(np.asarray(after.params["w"]))
    same(ends[0], ends[1])
    same(ends[0], ends[2])
    assert not np.array_equal(ends[0], ends[3])
    for wrong in (jax.random.key(0), jax.random.PRNGKey(0)):
        with pytest.raises(TypeError, match=r"floating point, but leaf \['key'\] is (key|uint32)"):
            method().init(params, {**lam, "key": wrong})


def test_58_side_effects_of_a_loss_happen_while_it_is_traced(capsys):
    calls = []

    def noisy(w, lam, batch):
        calls.append(1)
        print("traced")
        jax.debug.print("ran")
        return train_loss(w, lam, batch)

    opt = method()
    state = step(opt, opt.init(*start()), (noisy, val_loss))
    seen = len(calls)
    for transform in (jax.jit, jax.vmap):
        states = (
            jax.tree.map(lambda x: jnp.stack([x, x]), state) if transform is jax.vmap else state
        )
        transform(lambda state: step(opt, state, (noisy, val_loss)))(states)
    traced = len(calls)
    step(opt, state, (noisy, val_loss))
    jax.effects_barrier()
    assert seen and len(calls) == traced  # a call that is compiled already runs no Python
    assert {"traced", "ran"} <= set(capsys.readouterr().out.split())


# -- 59 -------------------------------------------------------------------------------------------


def twice(tree):
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


def seen(state):
    """What can be compared: all but keys."""
    return state.params, state.hyperparams, state.metadata


@pytest.mark.parametrize("name", ["one_step", "hyperdistill", "reverse"])
def test_59_transformations_give_the_numbers_of_the_plain_call(name):
    """Of every kind of method: tests/algorithms/test_compilations.py."""
    opt = method(name)
    state = opt.init(*start(name), train_batch=batch(0))
    batches = np.stack([batch(i) for i in range(2)])

    def one(state, x):
        return opt.step(state, x, x, *LOSSES, lr_hyper=0.1)

    plain = one(one(state, batches[0]), batches[1])
    scanned, _ = jax.lax.scan(lambda s, x: (one(s, x), None), state, batches)
    jitted = jax.jit(lambda s, xs: one(one(s, xs[0]), xs[1]))(state, batches)
    mapped = jax.vmap(lambda s: one(one(s, batches[0]), batches[1]))(twice(state))
    for got in (scanned, jitted, jax.tree.map(lambda x: x[0], mapped)):
        for a, b in zip(*map(jax.tree.leaves, map(seen, (got, plain))), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_59_a_run_under_jit_says_that_it_is_a_loop_on_the_host():
    opt = method()
    with pytest.raises(TypeError, match="run draws its batches on the host.*run_episodes"):
        jax.jit(lambda state: run(opt, state))(opt.init(*start()))


def test_59_a_step_can_be_differentiated():
    """The weights after it are a function of the hyperparameters, as those of plain training."""
    opt, x = method(), batch(0)
    state = opt.init(*start())

    def by_gradhpo(lam):
        return jnp.sum(opt.step(state.update(hyperparams=lam), x, x, *LOSSES, lr_hyper=0.0).params["w"] ** 2)  # fmt: skip # noqa: E501

    def by_hand(lam):
        w = state.params
        g = jax.grad(train_loss)(w, lam, x)["w"]
        return jnp.sum((w["w"] - jnp.exp(lam["rate"]) * g) ** 2)

    got, want = (jax.grad(f)(state.hyperparams) for f in (by_gradhpo, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


SHARDED = """
import warnings
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from interface_cases import LOSSES, METHODS, batch, method, start
from gradhpo import GradhpoWarning
warnings.simplefilter("ignore", GradhpoWarning)
assert jax.device_count() == 2
def numbers(state):
    return jax.tree.leaves((state.params, state.hyperparams, state.metadata))
mesh = Mesh(np.array(jax.devices()), ("data",))
rows, all_ = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
for name in METHODS:
    opt = method(name)
    state = opt.init(*start(name), train_batch=batch(0))
    ends = []
    for place in (lambda x: x, lambda x: jax.device_put(x, rows)):
        data = place(batch(1)), place(batch(2))
        new = state
        if len(ends):
            new = jax.device_put(state, all_)
        for _ in range(2):
            new = opt.step(new, *data, *LOSSES, lr_hyper=0.1)
        ends.append(new)
    for a, b in zip(*map(numbers, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.faults
def test_59_sharded_batches_give_the_numbers_of_the_plain_call():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip() == "the same", done.stderr[-3000:]


# -- 60 -------------------------------------------------------------------------------------------

OUTSIDE = [
    (gh.spaces.interval(0, 1), 2.0, "is not between 0 and 1"),
    (gh.spaces.interval(0, 1), 1.0, "at a bound, which this map never reaches.*by='projection'"),
    (gh.spaces.interval(0, 1, by="projection"), -0.1, "is not between"),
    (gh.spaces.interval(0, 1), 1 - 1e-9, "too close to a bound for float32"),
    (gh.spaces.log(), 0.0, "is not above 0"),
    (gh.spaces.positive(), -1.0, "is not above 0"),
    (gh.spaces.probability(), 0.0, "at a bound"),
    (gh.spaces.log(), np.nan, "is not"),
    (gh.spaces.unconstrained(), np.inf, "is not finite"),
    (gh.spaces.integer(1, 5), 2.5, "is no whole number"),
]


@pytest.mark.parametrize("space, value, message", OUTSIDE)
def test_60_a_start_outside_of_its_space_is_refused(space, value, message, x32):
    with pytest.raises(ValueError, match=rf"leaf \['scale'\] .*{message}"):
        task(lam={"rate": -2.0, "scale": value}, space={"rate": None, "scale": space})


@pytest.mark.parametrize(
    "space, values",
    [
        (gh.spaces.interval(-1, 3), [-0.999, 0.0, 1.7, 2.999]),
        (gh.spaces.interval(0, 1, by="projection"), [0.0, 0.3, 1.0]),
        (gh.spaces.log(), [1e-30, 1e-3, 1.0, 1e30]),
        (gh.spaces.positive(), [1e-3, 1.0, 50.0]),
        (gh.spaces.probability(), [1e-6, 0.5, 0.999]),
        (gh.spaces.integer(1, 5), [1.0, 3.0, 5.0]),
    ],
    ids=str,
)
def test_60_what_is_stored_is_the_value_again(space, values):
    for value in values:
        posed = task(lam={"rate": -2.0, "scale": value}, space={"rate": None, "scale": space})
        again = posed.values(posed.stored.hyperparams)["scale"]
        np.testing.assert_allclose(again, value, rtol=2e-5)


@pytest.mark.parametrize("door", ["step", "tune", "functions"])
def test_60_a_start_that_is_not_finite_is_refused(door):
    for value in (np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"leaf \['scale'\] of hyperparams is not finite"):
            DOORS[door](LOSSES, lam={"rate": -2.0, "scale": value})
