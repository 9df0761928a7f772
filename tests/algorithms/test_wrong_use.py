"""Wrong use of the interface (reliability.md rows 42, 43, 47-60): what the message must say."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import (
    KINDS,
    METHODS,
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

from gradhpo import (
    FOOptimizer,
    GradhpoWarning,
    GreedyOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    ReverseOptimizer,
    T1T2Optimizer,
)

CLASSES = (
    FOOptimizer,
    OneStepOptimizer,
    T1T2Optimizer,
    GreedyOptimizer,
    OnlineHypergradientOptimizer,
)


@pytest.mark.parametrize("cls", CLASSES)
def test_exactly_one_way_to_train(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} takes either update_fn=.*got neither"):
        cls()
    with pytest.raises(ValueError, match="got both"):
        cls(update_fn=update_fn, inner_optimizer=sgd)


@pytest.mark.parametrize(
    "cls, settings, error, message",
    [
        (T1T2Optimizer, {"gamma": 1.5}, ValueError, r"gamma must lie in \[0, 1\], got 1.5"),
        (GreedyOptimizer, {"gamma": -1}, ValueError, r"gamma must lie in \[0, 1\], got -1"),
        (OnlineHypergradientOptimizer, {"gamma": float("nan")}, ValueError, "gamma.*nan"),
        (OnlineHypergradientOptimizer, {"gamma": "0.9x"}, TypeError, "gamma.*'0.9x'"),
        (OnlineHypergradientOptimizer, {"T": 0}, ValueError, "T must be at least 1, got 0"),
        (OneStepOptimizer, {"T": -3}, ValueError, "T must be at least 1, got -3"),
        (OneStepOptimizer, {"T": 2.0}, TypeError, r"T must be a whole number, got 2.0 \(float\)"),
        (OneStepOptimizer, {"T": True}, TypeError, "T must be a whole number, got True"),
        (GreedyOptimizer, {"T": 7}, ValueError, "multiple of the 5 steps.*got T=7"),
        (
            GreedyOptimizer,
            {"unroll_steps": 0},
            ValueError,
            "unroll_steps.* must be at least 1, got 0",
        ),
        (ReverseOptimizer, {}, ValueError, "ReverseOptimizer needs T="),
        (
            OnlineHypergradientOptimizer,
            {"estimation_period": 0},
            ValueError,
            "estimation_period.*0",
        ),
        (OnlineHypergradientOptimizer, {"theta": "fit"}, ValueError, "theta must be.*'fit'"),
        (OnlineHypergradientOptimizer, {"theta": np.inf}, ValueError, "theta must be finite"),
        (OnlineHypergradientOptimizer, {"points": "curve"}, ValueError, "points.*'curve'"),
        (OnlineHypergradientOptimizer, {"sampling": "x"}, ValueError, "sampling.*'x'"),
        (OnlineHypergradientOptimizer, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        (T1T2Optimizer, {"eps": 0.0}, ValueError, "eps.*positive, got 0.0"),
        (T1T2Optimizer, {"eps": "small"}, ValueError, "eps must be 'auto'.*'small'"),
        (FOOptimizer, {"loop": "while"}, ValueError, "loop must be.*'while'"),
        (FOOptimizer, {"outer_optimizer": 0.1}, TypeError, "outer_optimizer.*Optax.*0.1"),
        (
            FOOptimizer,
            {"outer_optimizer": optax.sgd},
            TypeError,
            "outer_optimizer must be an Optax",
        ),
    ],
)
def test_settings_are_checked_in_the_constructor(cls, settings, error, message):
    with pytest.raises(error, match=message):
        cls(update_fn=update_fn, **settings)


def test_settings_that_look_odd_and_are_fine():
    for gamma in (0, 1, np.float32(0.5), jnp.float32(0.5)):
        opt = OnlineHypergradientOptimizer(update_fn=update_fn, gamma=gamma, T=np.int64(3))
        hash(opt)
        assert type(opt.gamma) in (int, float) and isinstance(opt.T, int)
        assert opt == dataclasses.replace(opt, gamma=float(gamma))
    with pytest.raises(TypeError, match="update_fn must be a function"):
        FOOptimizer(update_fn=3)
    with pytest.raises(TypeError, match="inner_optimizer"):
        FOOptimizer(inner_optimizer="adam")


@pytest.mark.parametrize("name", KINDS)
def test_rates_are_given_once(name):
    opt, outer = method(name), method(name, outer_optimizer=optax.sgd(0.1))
    state = opt.init(*start())
    data = batch(0), batch(1), train_loss, val_loss
    with pytest.raises(ValueError, match="outer_optimizer=.*lr_hyper=.*got neither"):
        opt.step(state, *data)
    with pytest.raises(ValueError, match="got neither"):
        run(opt, state, lr_hyper=None)
    with pytest.raises(ValueError, match="got both"):
        outer.step(outer.init(*start()), *data, lr_hyper=0.1)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"M": 0}, ValueError, "M must be at least 1, got 0"),
        ({"M": 1.5}, TypeError, "M must be a whole number, got 1.5"),
        ({"T": 0}, ValueError, "T must be at least 1, got 0"),
        ({"T": None}, ValueError, "does not know how many inner steps"),
        ({"lr_reptile": 2.0}, ValueError, r"lr_reptile must lie in \[0, 1\], got 2.0"),
        ({"get_train_batch": [1, 2]}, TypeError, "get_train_batch must be a function"),
        ({"get_val_batch": None}, TypeError, "get_val_batch must be a function.*None"),
        ({"callback": "print"}, TypeError, "callback must be a function"),
        ({"losses": (None, val_loss)}, TypeError, "train_loss_fn must be a function"),
    ],
)
def test_run_checks_its_arguments_before_anything_is_drawn(arguments, error, message):
    drawn = []

    def get():
        drawn.append(1)
        return batch(0)

    opt = OneStepOptimizer(update_fn=update_fn)
    settings = {"T": 4, "get_train_batch": get, "get_val_batch": get, **arguments}
    with pytest.raises(error, match=message):
        run(opt, opt.init(*start()), **settings)
    assert not drawn


def test_every_method_refuses_a_state_that_is_none_of_its():
    opt = method("hyperdistill")
    with pytest.raises(TypeError, match="BilevelState from init, got dict"):
        step(opt, {})
    with pytest.raises(ValueError, match="made by another method.*tuple.*DistillMemory"):
        step(opt, method("fo").init(*start()))


BAD_LOSSES = {
    "vector": (lambda w, lam, b: (w["w"] - b) ** 2, r"returned shape \(3, 2\).*jnp.mean"),
    "None": (lambda w, lam, b: None, "returned None.*`return` missing"),
    "large metric": (lambda w, lam, b: (jnp.mean(w["w"]), w), "'w'.*must be a scalar.*Reduce it"),
    "triple": (lambda w, lam, b: (jnp.mean(w["w"]), {}, w), r"\(loss, metrics\).*model_state"),
    "no dictionary": (lambda w, lam, b: (jnp.mean(w["w"]), 1.0), "dictionary of scalars"),
    "integer": (lambda w, lam, b: jnp.sum(w["w"] > 0), "int.*no gradient"),
    "dictionary": (lambda w, lam, b: {"loss": jnp.mean(w["w"])}, "scalar, but returned.*dict|loss"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
@pytest.mark.parametrize("which", ["train_loss_fn", "val_loss_fn"])
@pytest.mark.parametrize("call", ["step", "run", "compute_hypergradient"])
def test_losses_must_be_scalars(kind, which, call):
    bad, message = BAD_LOSSES[kind]
    losses = (bad, val_loss) if which == "train_loss_fn" else (train_loss, bad)
    opt = method("one_step")
    state = opt.init(*start())
    with pytest.raises(
        TypeError, match=f"(?s)^(?=.*{which}).*must.*({message})|^(?=.*{which}).*({message})"
    ):
        if call == "step":
            step(opt, state, losses=losses)
        elif call == "run":
            run(opt, state, losses=losses)
        else:
            opt.compute_hypergradient(state, batch(0), batch(0), *losses)


def test_a_failing_loss_names_the_shapes():
    opt = method("one_step")

    def wrong(w, lam, b):
        return jnp.mean(b @ jnp.ones((5, 2)))

    with pytest.raises(TypeError) as caught:
        step(opt, opt.init(*start()), losses=(train_loss, wrong))
    assert any("val_loss_fn" in note and "(3, 2)" in note for note in caught.value.__notes__)


# -- what is never meant, but legal: one warning per run, an error if strict ----------------------


def ignores_scale(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + jnp.exp(lam["rate"])


def stopped(w, lam, batch):
    return jnp.mean((jax.lax.stop_gradient(w["w"]) - batch) ** 2) * jnp.exp(lam["scale"])


@pytest.mark.parametrize(
    "losses, message",
    [
        ((ignores_scale, ignores_scale), r"leaf \['scale'\] is identically zero"),
        ((stopped, val_loss), r"no gradient path to params leaf \['w'\]"),
    ],
    ids=["a hyperparameter", "a parameter"],
)
def test_what_has_no_effect_is_named_once_per_run(losses, message):
    opt = method("one_step", inner_optimizer=optax.sgd(0.1))
    state = opt.init(*start())
    for _ in range(2):
        with pytest.warns(GradhpoWarning, match=message) as caught:
            run(opt, state, M=3, losses=losses)
        assert len([w for w in caught if issubclass(w.category, GradhpoWarning)]) == 1
    with pytest.warns(GradhpoWarning, match=message) as caught:
        after = step(opt, state, losses=losses)
        step(opt, after, losses=losses)
    assert len(caught) == 1
    strict = method("one_step", inner_optimizer=optax.sgd(0.1), strict=True)
    for call in (run, step):
        with pytest.raises(ValueError, match=message):
            call(strict, strict.init(*start()), losses=losses)


def test_a_flat_loss_is_not_an_ignored_hyperparameter():
    """A zero that is not structural is no reason to complain."""

    def flat(w, lam, batch):
        return jnp.sum(jnp.maximum(w["w"] + lam["scale"] + lam["rate"] - 100.0, 0.0))

    opt = method("one_step", inner_optimizer=optax.sgd(0.1), strict=True)
    after = step(opt, opt.init(*start()), losses=(flat, flat))
    assert float(after.metadata["hypergrad_norm"]) == 0.0


def test_a_new_lambda_every_call_is_named():
    """One warning, at the fourth compilation, with the argument that changes."""
    opt = method("one_step")
    state = opt.init(*start())
    with pytest.warns(GradhpoWarning, match="compiled 4 times, because val_loss_fn") as caught:
        for _ in range(8):
            state = step(opt, state, losses=(train_loss, lambda w, lam, b: val_loss(w, lam, b)))
    assert len(caught) == 1
    strict = method("one_step", strict=True)
    with pytest.raises(ValueError, match="define them once"):
        for _ in range(8):
            fresh = functools.partial(train_loss)
            step(strict, state, losses=(fresh, val_loss))


def test_a_new_optimizer_object_every_time_is_named():
    with pytest.warns(GradhpoWarning, match="inner_optimizer is a new object"):
        for _ in range(5):
            opt = T1T2Optimizer(inner_optimizer=optax.adam(0.1, eps_root=1e-8), T=2)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*identically zero.*")
                step(opt, opt.init(*start()))


def test_changing_batch_sizes_are_named():
    opt = method("one_step", loop="unroll")  # nobody else's programs
    state = opt.init(*start())
    with pytest.warns(GradhpoWarning, match="compiled 4 times.*partial") as caught:
        for n in range(2, 8):
            x = np.ones((n, 2), np.float32)
            opt.step(state, x, x, train_loss, val_loss, lr_hyper=0.1)
    assert len(caught) == 1


@pytest.mark.parametrize("name", METHODS)
def test_ordinary_use_does_not_warn(name):
    """init, a few hypergradients and steps before and after a run, with and without shapes."""
    outer = optax.sgd(0.1)  # a new object: nothing was compiled before
    opt = method(name, outer_optimizer=outer)
    for train_batch in (None, batch(0)):
        state = opt.init(*start(name=name), train_batch=train_batch)
        for _ in range(2):
            opt.compute_hypergradient(state, batch(0), batch(1), train_loss, val_loss)
            state = step(opt, state)
        state = run(opt, state)
        opt.compute_hypergradient(state, batch(0), batch(1), train_loss, val_loss)
        step(opt, state)
