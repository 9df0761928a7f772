"""What test_fuzz.py and a look at every way in have found, each in its own words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interface_cases import LOSSES, ONE_STEP, method, rated, run, start, step, task

import gradhpo as gh


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("reverse", {"T": jax.random.key(0)}, r"T of ReverseOptimizer.*array of key<fry>\[\]"),
        ("greedy", {"gamma": np.ones(2)}, r"gamma of Greedy.*cannot be an array of float64\[2\]"),
        ("t1t2", {"eps": jnp.ones(0)}, "eps of T1T2Optimizer is a setting"),
        ("one_step", {"strict": "no"}, "strict must be True or False, got 'no'"),
        ("implicit_cg", {"warm_start": 1}, "warm_start must be True or False, got 1"),
        ("hyperdistill", {"theta_guard": None}, "theta_guard must be True or False, got None"),
        ("saba", {"index": [1]}, "index of SABAOptimizer.*must be hashable"),
        ("one_step", {"loop": {}}, "loop of OneStepOptimizer.*must be hashable"),
    ],
)
def test_settings_that_are_none_are_named(name, settings, message):
    with pytest.raises(TypeError, match=message):
        method(name, **settings)


def test_numbers_of_numpy_are_settings_like_those_of_python():
    opt = method("hyperdistill", gamma=np.float32(0.5), theta_guard=np.bool_(True), T=np.int64(4))
    assert opt == method("hyperdistill", gamma=0.5)
    assert type(opt.theta_guard) is bool and hash(opt)


@pytest.mark.parametrize("text", ["float32", "f", b"f", float, np.float32])
def test_the_name_of_a_dtype_is_no_number(text):
    for params, lam in (({"w": text}, start()[1]), (start()[0], {**start()[1], "scale": text})):
        with pytest.raises(TypeError, match=r"leaf \['(w|scale)'\] of \w+ is not an array but"):
            method().init(params, lam)


def test_a_model_state_is_looked_at_like_the_weights():
    for leaf, message in (("x", "is not an array"), (np.ones(2), "is float64")):
        with pytest.raises(TypeError, match=rf"leaf \['m'\] of the model state {message}"):
            method().init(*start(), model_state={"m": leaf})


@pytest.mark.parametrize(
    "data, message",
    [
        ([[1.0, 2.0], [3.0]], r"ragged: \[\[1.0, 2.0\], \[3.0\]\].*Pad it"),
        ({"x": np.array(["a"])}, r"leaf \['x'\] of train_batch has dtype <U1"),
        ({"x": np.zeros((0, 2))}, r"train_batch: empty batch. Leaf \['x'\]"),
    ],
)
def test_a_batch_that_is_none_is_refused_by_init_and_by_step(data, message):
    opt = method()
    for call in (
        lambda: opt.init(*start(), data),
        lambda: opt.step(opt.init(*start()), data, data, *LOSSES, lr_hyper=0.1),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_a_list_of_empty_containers_is_a_container():
    """It was taken for numbers, and became an array of objects."""
    opt = method("one_step")
    assert opt.init(*start(), [{}, {}]) is not None


@pytest.mark.parametrize("name", ["forward", "reversible", "amigo", "reverse"])
def test_methods_that_count_steps_by_the_batches_need_an_array_in_them(name):
    def loss(w, lam, batch):
        return LOSSES[0](w, lam, 1.0)

    opt = method(name)
    with pytest.raises(ValueError, match="a batch needs at least one array.*give a dummy"):
        opt.step(opt.init(*start()), {}, {}, loss, loss, lr_hyper=0.1)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"step": "x"}, TypeError, "step must be a whole number, got 'x'"),
        ({"episode": 1.5}, TypeError, "episode must be a whole number, got 1.5"),
        ({"drawn": -1}, ValueError, "drawn must be at least 0"),
        ({"metadata": None}, TypeError, "metadata is a dictionary of metrics, got None"),
        ({"params": {"w": jnp.arange(2)}}, TypeError, "params has no floating-point leaf"),
        ({"hyperparams": {"rate": "a", "scale": 1.0}}, TypeError, r"\['rate'\].*not an array"),
    ],
)
def test_what_is_put_into_a_state_is_looked_at(fields, error, message):
    with pytest.raises(error, match=message):
        method().init(*start()).update(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"metadata": {}}, "the metadata of this state lack 'direct_norm'"),
        ({"counts": jnp.zeros(3, jnp.int32)}, r"counts of this state have the shape \(3,\)"),
        ({"hyperparams": {"rate": jnp.int32(1), "scale": jnp.ones(())}}, r"\['rate'\] is int32"),
    ],
)
def test_a_state_made_by_hand_is_refused_at_the_first_call(fields, message):
    opt = method()
    state = dataclasses.replace(opt.init(*start()), **fields)
    for call in (step, run):
        with pytest.raises((TypeError, ValueError), match=message):
            call(opt, state)


def test_a_metric_of_text_is_named():
    opt = method()
    state = opt.init(*start()).update(metadata={"note": "text"})
    for call in (step, run):
        with pytest.raises(TypeError, match=r"\.metadata\['note'\] of .*not an array but 'text'"):
            call(opt, state)


PROBLEM = gh.BilevelProblem(gh.from_optax(LOSSES[0], rated), LOSSES[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gh.init_state(None, ONE_STEP, None, *start()), "init_state takes a .*NoneType"),
        (lambda: gh.init_state(PROBLEM, gh.one_step, None, *start()), "brackets of a call missing"),
        (lambda: gh.init_state(PROBLEM, ONE_STEP, optax.sgd, *start()), "outer_optimizer must be"),
        (lambda: gh.init_state(PROBLEM, ONE_STEP, None, {"w": "x"}, {}), r"\['w'\] of params"),
        (lambda: gh.bilevel_step(gh.one_step), "bilevel_step takes a gradhpo.Estimator"),
        (lambda: gh.bilevel_step(ONE_STEP, optax.sgd), "outer_optimizer must be"),
        (lambda: gh.from_update(None), "update_fn must be a function"),
        (lambda: gh.from_optax(LOSSES[0], 0.1), "the inner optimizer must be a function"),
        (lambda: tuned(task((None, LOSSES[1]))), "train_loss_fn must be a function"),
        (lambda: tuned(task((LOSSES[0], None))), "val_loss_fn must be a function"),
        (lambda: tuned(task(), lambda loop: 3), "tune takes a gradhpo.Estimator.*got 3"),
    ],
)
def test_arguments_of_the_functions_are_told_apart(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def tuned(task, estimator=ONE_STEP):
    return gh.tune(task, estimator, episodes=1, T=2, lr_hyper=0.1)
