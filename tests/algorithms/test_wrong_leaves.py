"""Leaves, steps and batches that do not fit (reliability.md rows 50-53, 57, 58)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import (
    batch,
    method,
    run,
    sgd,
    start,
    step,
    train_loss,
    update_fn,
    val_loss,
)


@pytest.mark.parametrize(
    "lam, error, message",
    [
        ({"rate": 0.1, "k": jnp.int32(3)}, TypeError, r"leaf \['k'\] is int32 \(value 3\).*space="),
        ({"rate": 0.1, "flag": True}, TypeError, r"leaf \['flag'\] is bool.*Cast"),
        ({"rate": 0.1, "name": "sgd"}, TypeError, r"leaf \['name'\] of hyperparams.*'sgd'"),
        ({}, ValueError, "nothing to tune"),
        (None, ValueError, "nothing to tune"),
    ],
)
def test_hyperparameters_are_floating_point(lam, error, message):
    with pytest.raises(error, match=message):
        method("one_step").init({"w": jnp.ones(2)}, lam)


def test_params_need_something_to_train():
    with pytest.raises(TypeError, match=r"no floating-point leaf.*\['n'\]: int32"):
        method("one_step").init({"n": jnp.int32(3)}, {"rate": 0.1, "scale": 0.1})


def test_integer_frozen_and_missing_parts_pass_through():
    """Integers, keys, None beside the weights, with either way of training."""
    params, lam = start()
    params = {**params, "count": jnp.int32(3), "key": jax.random.key(1), "bias": None}

    def update(w, lam, b):
        return {**w, **update_fn({"w": w["w"]}, lam, b)}

    for settings in ({"update_fn": update}, {"inner_optimizer": sgd}):
        opt = method("hyperdistill", **settings)
        after = run(opt, opt.init(params, lam))
        assert after.params["count"] == 3 and after.params["bias"] is None
        assert jnp.array_equal(*(jax.random.key_data(p["key"]) for p in (params, after.params)))
        assert not np.array_equal(after.params["w"], params["w"])


@pytest.mark.parametrize(
    "update, message",
    [
        (
            lambda w, lam, b: {"w": w["w"], "extra": w["w"]},
            r"keep its structure.*\['extra'\]|extra",
        ),
        (
            lambda w, lam, b: {"w": w["w"][:1] + lam["rate"]},
            r"\['w'\].*float32\[2\] to float32\[1\]",
        ),
        (
            lambda w, lam, b: {
                "w": w["w"].astype(jnp.bfloat16) + 0 * lam["rate"].astype(jnp.bfloat16)
            },
            r"float32\[2\] to bfloat16\[2\]",
        ),
        (lambda w, lam, b: w["w"], "keep its structure"),
    ],
    ids=["structure", "shape", "dtype", "container"],
)
def test_a_step_must_return_what_it_got(update, message):
    """Rows 52, 53."""
    opt = method("one_step", update_fn=update)
    state = opt.init(*start())
    for call in (step, run):
        with pytest.raises(ValueError, match=f"(?s)Phi|state.*({message})"):
            call(opt, state)


def test_a_tree_of_rates_that_does_not_fit_is_explained():
    with pytest.raises((ValueError, TypeError)) as caught:
        opt = method("one_step", inner_optimizer=lambda lam: optax.sgd(lam))
        step(opt, opt.init(*start()))
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "gradhpo" in text or "learning rate" in text


def test_line_search_optimizers_are_refused_by_name():
    opt = method("one_step", inner_optimizer=optax.polyak_sgd())
    with pytest.raises(ValueError, match="polyak_sgd.*first-order optimizer"):
        step(opt, opt.init(*start()))


def test_another_batch_size_after_a_run():
    """Every episode starts a new D*, so a run of other batches works; a step inside an
    episode cannot mix two sizes, and says so."""
    opt = method("hyperdistill")
    state = run(opt, opt.init(*start()))
    x = np.ones((5, 2), np.float32)
    with pytest.raises((ValueError, TypeError), match="batch"):
        opt.step(state, x, x, train_loss, val_loss, lr_hyper=0.1)
    run(opt, state, get_train_batch=lambda: x, get_val_batch=lambda: x)


def test_a_kept_batch_of_one_is_not_broadcast():
    opt = method("hyperdistill")
    one = np.ones((1, 2), np.float32)
    state = opt.step(opt.init(*start()), one, one, train_loss, val_loss, lr_hyper=0.1)
    with pytest.raises((ValueError, TypeError), match="batch"):
        step(opt, state)


def test_ending_an_episode_that_never_began():
    opt = method("one_step")
    state = opt.init(*start())
    with pytest.raises(ValueError, match="start_episode"):
        opt.end_episode(state, 0.5)
    for params in (np.ones(2, np.float32), np.ones((1, 0), np.float32)):  # bare NumPy arrays
        begun = opt.start_episode(opt.init(jnp.asarray(params), start()[1])).update(phi=params)
        opt.end_episode(begun, 0.5)


def test_side_effects_and_printing_do_not_crash():
    """A legacy key in the batch is data like any other."""
    calls = []

    def noisy(w, lam, batch):
        x, key = batch
        calls.append(1)
        return train_loss(w, lam, x + 0.1 * jax.random.normal(key, x.shape))

    def judge(w, lam, batch):
        return val_loss(w, lam, batch[0])

    opt = method("one_step", inner_optimizer=sgd)
    results = []
    for make in (jax.random.PRNGKey, jax.random.key):
        data = batch(0), make(3)
        after = opt.step(opt.init(*start()), data, data, noisy, judge, lr_hyper=0.1)
        results.append(np.asarray(after.params["w"]))
    np.testing.assert_array_equal(*results)
    assert calls
