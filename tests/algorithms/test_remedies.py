"""Mistakes whose error must name the remedy: states, losses, optimizers, loops, rates."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import batch, method, run, sgd, start, step, train_loss, val_loss

from gradhpo import (
    BilevelProblem,
    ESOptimizer,
    Window,
    bilevel_step,
    from_optax,
    from_update,
    init_state,
    linear_decay,
    one_step,
    run_episodes,
)


def traced(opt, state, losses=(train_loss, val_loss), data=None):
    """`step`, traced and not compiled."""
    data = batch(0) if data is None else data
    return jax.eval_shape(lambda s: opt.step(s, data, data, *losses, lr_hyper=0.1), state)


def text_of(error):
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def two(w, batch):
    return jnp.mean((w["w"] - batch) ** 2)


def slow_root(x):
    return jax.lax.while_loop(lambda y: y * y > x, lambda y: 0.9 * y, 1.0 + x)


def with_while(w, lam, batch):
    return train_loss(w, lam, batch) * slow_root(w["w"][0] ** 2 + jnp.exp(lam["rate"]))


def while_update(w, lam, batch):
    return {"w": w["w"] - slow_root(jnp.exp(lam["rate"] + lam["scale"])) * batch[0]}


ADAM = optax.adam(0.1, eps_root=1e-8)
INIT_REMEDY = (
    r"Make the state by the init of the optimizer.*init\(state.params, state.hyperparams\)"
)
STATES = {
    "another method": (method("hyperdistill"), method("fo"), "made by another method.*tuple"),
    "another horizon": (
        method("pes", pairs=4),
        method("pes", pairs=2),
        r"another PESOptimizer.*its memory.*has shape \(2, 2\) against \(4, 2\)",
    ),
    "other inner slots": (
        method("one_step", inner_optimizer=ADAM),
        method("one_step", inner_optimizer=sgd),
        r"another inner optimizer.*inner_opt_state.*leaf \[0\].count is only in one",
    ),
    "slots for none": (
        method("one_step", inner_optimizer=sgd),
        method("one_step", inner_optimizer=ADAM),
        r"another inner optimizer.*inner_opt_state",
    ),
    "other outer slots": (
        method("one_step"),
        method("one_step", outer_optimizer=ADAM),
        r"another outer optimizer.*outer_opt_state.*leaf \[0\].count",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_of_another_optimizer(case):
    """The slots and memory of one optimizer are no start for another."""
    opt, other, message = STATES[case]
    state = other.init(*start())
    with pytest.raises(ValueError, match=f"(?s){message}.*{INIT_REMEDY}"):
        run(opt, state) if case == "another method" else traced(opt, state)


def test_hyperparameters_of_another_shape():
    """Slots of the outer optimizer tell that lam was another; the step would reshape it."""
    opt = method("one_step", outer_optimizer=ADAM)
    params, lam = start()
    state = opt.init(params, {**lam, "rate": jnp.zeros(3)}).update(hyperparams=lam)
    with pytest.raises(
        ValueError, match=r"another outer.*\['rate'\] has shape \(3,\) against \(\)"
    ):
        jax.eval_shape(functools.partial(step, opt), state)


THREE = (
    r"written as \(w, batch\), but is called with three arguments: \(params, hyperparams, batch\)"
)
SWAPPED = r"first two arguments exchanged. The order is init\(params, hyperparams\)"


@pytest.mark.parametrize(
    "settings, swap, losses, message",
    [
        ({}, True, (train_loss, val_loss), "update_fn|train_loss_fn.*" + SWAPPED),
        ({"inner_optimizer": optax.sgd(0.1)}, True, (train_loss, val_loss), SWAPPED),
        ({}, False, (two, val_loss), "train_loss_fn is " + THREE),
        ({}, False, (train_loss, two), "val_loss_fn is " + THREE),
        ({"update_fn": two}, False, (train_loss, val_loss), "update_fn is " + THREE),
        (
            {},
            False,
            (train_loss, lambda w, lam, b: lam["depth"] * two(w, b)),
            r"hyperparams leaves \['rate'\]: \(\), \['scale'\]: \(\)",
        ),
        ({"inner_optimizer": optax.sgd(0.1)}, False, (with_while, val_loss), "use lax.scan"),
        ({}, False, (train_loss, with_while), "evolution strategies do"),
        ({"update_fn": while_update}, False, (train_loss, val_loss), "ForwardOptimizer"),
        (
            {"inner_optimizer": optax.lookahead(optax.sgd(0.1), 2, 0.5)},
            False,
            (train_loss, val_loss),
            r"update of the inner optimizer.*\(optax.lookahead\) goes into an update_fn",
        ),
        (
            {"inner_optimizer": lambda lam: optax.sgd({"w": jnp.exp(lam["rate"])})},
            False,
            (train_loss, val_loss),
            "scale_by_tree",
        ),
    ],
    ids=[
        "swapped with update_fn",
        "swapped",
        "train loss of two",
        "val loss of two",
        "update_fn of two",
        "missing hyperparameter",
        "while in the train loss",
        "while in the val loss",
        "while in update_fn",
        "lookahead",
        "tree of rates",
    ],
)
def test_a_call_that_fails_names_the_remedy(settings, swap, losses, message):
    def attempt():
        opt, (params, lam) = method("one_step", **settings), start()
        state = opt.init(lam, params) if swap else opt.init(params, lam)
        traced(opt, state, losses)

    with pytest.raises(Exception) as caught:
        attempt()
    assert re.search(f"(?s){message}", text_of(caught.value)), text_of(caught.value)


def test_lookahead_with_its_own_parameters():
    opt = method("one_step", inner_optimizer=optax.lookahead(optax.sgd(0.1), 2, 0.5))
    params, lam = start()
    state = opt.init(optax.LookaheadParams.init_synced(params), lam)

    def fast(w, lam, batch):
        return train_loss(w.fast, lam, batch)

    with pytest.raises((TypeError, ValueError)) as caught:
        traced(opt, state, (fast, fast))
    assert "(optax.lookahead) goes into an update_fn" in text_of(caught.value)


def test_loops_that_forward_mode_and_values_pass():
    """What the note on loops promises."""
    for opt, losses in (
        (method("forward", update_fn=while_update), (train_loss, val_loss)),
        (ESOptimizer(update_fn=while_update, T=1, pairs=1), (train_loss, with_while)),
    ):
        traced(opt, opt.init(*start()), losses)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (optax.sgd, r"optax.sgd itself.*optax.sgd\(0.1\), or a function of the hyperparameters"),
        (functools.partial(optax.sgd, momentum=0.9), "optax.sgd itself"),
        (optax.MultiSteps, "optax.MultiSteps itself"),
        (optax.GradientTransformation, "optax.GradientTransformation itself"),
        (lambda lam: optax.sgd, r"must return an Optax optimizer.*Is a call missing, optax.sgd\("),
    ],
    ids=["function", "partial", "MultiSteps", "class", "returned"],
)
def test_an_optimizer_that_was_not_made(optimizer, message):
    with pytest.raises(TypeError, match=f"(?s){message}"):
        method("one_step", inner_optimizer=optimizer).init(*start())


def test_optax_itself_is_a_factory_of_one_rate():
    """With one number for all hyperparameters, `optax.sgd` says what it means."""

    def loss(w, lam, batch):
        return two(w, batch)

    opt = method("one_step", inner_optimizer=optax.sgd)
    h = opt.compute_hypergradient(opt.init(start()[0], 0.5), batch(0), batch(1), loss, loss)
    want = jax.grad(lambda r: two({"w": start()[0]["w"] - r * descent()}, batch(1)))(0.5)
    np.testing.assert_allclose(h, want, rtol=1e-5)


def descent():
    return jax.grad(two)(start()[0], batch(0))["w"]


@pytest.mark.parametrize("call", ["step", "compute_hypergradient"])
def test_an_empty_batch_is_refused_by_step_too(call):
    opt = method("one_step")
    state, empty = opt.init(*start()), np.ones((0, 2), np.float32)
    rate = {"lr_hyper": 0.1} if call == "step" else {}
    for data, name in (((empty, batch(0)), "train_batch"), ((batch(0), empty), "val_batch")):
        with pytest.raises(ValueError, match=rf"{name}: empty batch.*shape \(0, 2\)"):
            getattr(opt, call)(state, *data, train_loss, val_loss, **rate)


# -- rates ----------------------------------------------------------------------------------------

BAD_RATES = {
    "text": ("0.1", TypeError, "must be a real number, got '0.1'"),
    "complex": (1j, TypeError, "must be a real number, got 1j"),
    "truth value": (True, TypeError, "must be a real number, got True"),
    "tree": ({"rate": 0.1}, TypeError, "must be a real number, got {'rate': 0.1}"),
    "list": ([0.1], TypeError, r"must be a real number, got \[0.1\]"),
    "two numbers": (np.ones(2), ValueError, r".*one number.*got shape \(2,\).*multi_transform"),
    "an axis": (jnp.ones(1), ValueError, r".*one number.*got shape \(1,\)"),
    "negative": (-0.1, ValueError, ".*at least 0, got -0.1.*negate the validation loss"),
    "negative array": (jnp.float32(-1), ValueError, ".*at least 0, got -1.0"),
    "NaN": (np.float32(np.nan), ValueError, ".*finite number of at least 0, got nan"),
    "infinite": (np.inf, ValueError, ".*finite number of at least 0, got inf"),
}


def functional(rate=0.1, outer=None):
    problem = BilevelProblem(from_update(lambda w, lam, batch: w - lam * batch), val)
    state = init_state(problem, one_step(), outer, jnp.zeros(3), jnp.zeros((3, 1)))
    window = Window(jnp.ones(1), jnp.ones(1))
    return bilevel_step(one_step(), outer)(problem, state, window, rate)


def val(w, lam, batch):
    return jnp.sum((w - batch) ** 2)


@pytest.mark.parametrize("kind", BAD_RATES)
def test_a_rate_is_one_number_of_at_least_zero(kind):
    rate, error, message = BAD_RATES[kind]
    opt = method("one_step")
    state = opt.init(*start())
    for call in (step, run):
        with pytest.raises(error, match=f"(?s)lr_hyper {message}"):
            call(opt, state, lr_hyper=rate)
    with pytest.raises(error, match=f"(?s)lr_hyper {message}"):
        functional(rate)


@pytest.mark.parametrize(
    "rate", [0, 0.1, np.float64(0.1), np.array(0.1), jnp.bfloat16(0.5)], ids=str
)
def test_rates_that_are_fine(rate):
    opt = method("one_step")
    after = jax.eval_shape(functools.partial(step, opt, lr_hyper=rate), opt.init(*start()))
    assert after.hyperparams["rate"].shape == ()


def test_a_traced_rate_keeps_its_shape():
    """Its value cannot be looked at; its shape can."""
    opt = method("one_step")
    state = opt.init(*start())

    def rated(rate):
        return step(opt, state, lr_hyper=rate)

    jax.eval_shape(rated, jnp.float32(-1.0))
    jax.eval_shape(jax.vmap(rated), jnp.ones(2))
    with pytest.raises(ValueError, match=r"one number.*got shape \(2,\)"):
        jax.eval_shape(rated, jnp.ones(2))


def test_functional_rates_are_given_once():
    with pytest.raises(ValueError, match="bilevel_step moves.*lr_hyper=.*got neither"):
        functional(None)
    with pytest.raises(ValueError, match="got both"):
        functional(0.1, optax.sgd(0.1))


def test_rates_of_episodes_are_one_for_each():
    problem = BilevelProblem(from_optax(train_loss, sgd), val_loss)
    state = init_state(problem, one_step(), None, *start())
    windows = Window(*(np.ones((2, 3, 4, 2), np.float32) for _ in range(2)))
    for rates in (0.1, np.ones(3), np.ones((2, 1))):
        with pytest.raises(ValueError, match=r"one rate for each of the 2 episodes.*linear_decay"):
            run_episodes(one_step(), None, problem, state, windows, rates)
    with pytest.raises(ValueError, match="lr_hyper must be a finite number of at least 0"):
        linear_decay(-1.0, 2)
    for rates in (np.array([0.1, -1.0]), jnp.array([np.nan, 0.1])):
        with pytest.raises(ValueError, match="every rate of lr_hyper must be a finite number"):
            run_episodes(one_step(), None, problem, state, windows, rates)
