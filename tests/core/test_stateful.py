"""Losses with a model state: a convolutional network with BatchNorm and Dropout.

What is tuned: a rate per layer, the weight decay, the label smoothing and the size of the input
noise. Every exact method equals `jax.grad` of the same training written out in JAX and Optax.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo import InOrder, Outer, Window, transforms
from gradhpo.testing import assert_trees_close
from gradhpo.utils.logging import JSONLinesLogger, log_callback

pytestmark = pytest.mark.usefixtures("x64")

T, CLASSES, MOMENTUM = 4, 3, 0.5
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "eps_root": 1e-8}
# An outer update that moves nothing and keeps the hypergradient, so that it can be read off.
READ = Outer(lambda lam: jax.tree.map(jnp.zeros_like, lam), lambda h, slots, lam: (lam, h))


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def network():
    """Weights and model state."""
    params = {
        "conv": {"kernel": numbers(1, 3, 3, 1, 2) / 3},
        "norm": {"scale": 1 + 0.1 * numbers(2, 2), "bias": 0.1 * numbers(3, 2)},
        "head": {"kernel": numbers(4, 18, CLASSES) / 4, "bias": np.zeros(CLASSES)},
    }
    return params, {"mean": np.zeros(2), "var": np.ones(2), "key": jax.random.key(0)}


def hyperparams():
    rates = {layer: np.asarray(np.log(0.05) + i / 10) for i, layer in enumerate(network()[0])}
    values = {"wd": np.log(0.1), "smooth": -2.0, "noise": -2.0}
    return {"lr": rates} | {name: np.asarray(x) for name, x in values.items()}


def window(steps=T):
    """Five images of 6 x 6 a batch."""
    rng = np.random.default_rng(5)
    sides = ((rng.random((steps, 5, 6, 6, 1)), rng.integers(0, CLASSES, (steps, 5))) for _ in "tv")
    return Window(*sides)


def features(w, x, statistics=None):
    """After the convolution and BatchNorm; the statistics are those of `x` if none are given."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, w["conv"]["kernel"], (2, 2), "SAME", dimension_numbers=layout
    )
    mean, var = statistics or (x.mean((0, 1, 2)), x.var((0, 1, 2)))
    x = (x - mean) / jnp.sqrt(var + 1e-3) * w["norm"]["scale"] + w["norm"]["bias"]
    return jnp.tanh(x).reshape(len(x), -1), (mean, var)


def scores(w, x):
    return jax.nn.log_softmax(x @ w["head"]["kernel"] + w["head"]["bias"])


def accuracy(logs, y):
    return {"accuracy": jnp.mean(logs.argmax(-1) == y)}


@jax.jit
def train_loss(w, lam, batch, state):
    x, y = batch
    key, for_noise, for_drop = jax.random.split(state["key"], 3)
    x = x + jnp.exp(lam["noise"]) * jax.random.normal(for_noise, x.shape, x.dtype)
    x, (mean, var) = features(w, x)
    x = jnp.where(jax.random.bernoulli(for_drop, 0.8, x.shape), x / 0.8, 0)
    logs, smooth = scores(w, x), jax.nn.sigmoid(lam["smooth"])
    picked = jnp.take_along_axis(logs, y[:, None], 1)
    loss = -jnp.mean((1 - smooth) * picked + smooth * logs.mean(-1, keepdims=True))
    state = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "var": 0.9 * state["var"] + 0.1 * var,
        "key": key,
    }
    return loss, (state, accuracy(logs, y))


@jax.jit
def val_loss(w, lam, batch, state):
    x, y = batch
    logs = scores(w, features(w, x, (state["mean"], state["var"]))[0])
    return -jnp.mean(jnp.take_along_axis(logs, y[:, None], 1)), accuracy(logs, y)


# -- optimizers: what gradhpo gets, and the same in Optax alone ------------------------------------


def rates(lam):
    return jax.tree.map(jnp.exp, lam["lr"])


def scaled(lam, factor=1.0):
    """Every layer's update times its rate, in plain Optax."""

    def scale(updates, params):
        del params
        return {k: jax.tree.map(lambda u: -factor * rates(lam)[k] * u, updates[k]) for k in updates}  # noqa: B023

    return optax.stateless(scale)


def adamw(lam):
    decay = optax.add_decayed_weights(jnp.exp(lam["wd"]))
    return optax.chain(optax.scale_by_adam(**ADAM), decay, scaled(lam))


def heavy_ball(factor=1.0):
    return lambda lam: optax.chain(optax.trace(MOMENTUM), scaled(lam, factor))


OPTIMIZERS = {
    "adamw": (adamw, adamw),
    "retraceable adam": (
        lambda lam: transforms.adam(rates(lam), **ADAM),
        lambda lam: optax.chain(optax.scale_by_adam(**ADAM), scaled(lam)),
    ),
    "retraceable momentum": (
        lambda lam: transforms.momentum_sgd(rates(lam), MOMENTUM),
        heavy_ball(),
    ),
    "reversible": (
        lambda lam: transforms.reversible_sgd(rates(lam), MOMENTUM),
        heavy_ball(1 - MOMENTUM),
    ),
}


def tuned(optimizer):
    """Without the decay where the optimizer has none."""
    lam = hyperparams()
    return lam if optimizer == "adamw" else {k: x for k, x in lam.items() if k != "wd"}


def written_out(optimizer, data, *, differentiate_state=False):
    """`lam -> (L_val, (w_T, model state))` of the training, in JAX and Optax."""
    make = OPTIMIZERS[optimizer][1]
    kept = (lambda m: m) if differentiate_state else jax.lax.stop_gradient

    def loss(lam):
        w, m = network()
        z = make(lam).init(w)
        for t in range(len(data.train[1])):
            batch = jax.tree.map(lambda x: x[t], data.train)  # noqa: B023
            g, (m, _) = jax.grad(train_loss, has_aux=True)(w, lam, batch, m)
            m = kept(m)
            updates, z = make(lam).update(g, z, w)
            w = optax.apply_updates(w, updates)
        return val_loss(w, lam, jax.tree.map(lambda x: x[-1], data.val), m)[0], (w, m)

    return loss


def same_state(got, want):
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


EXACT = {  # estimator, class and its settings, optimizer, steps
    "reverse": (gh.reverse(T), gh.ReverseOptimizer, {}, "adamw", T),
    "segments": (
        gh.reverse(T, memory="segments"),
        gh.ReverseOptimizer,
        {"memory": "segments"},
        "adamw",
        T,
    ),
    "retraceable adam": (gh.reverse(T), gh.ReverseOptimizer, {}, "retraceable adam", T),
    "retraceable momentum": (gh.reverse(T), gh.ReverseOptimizer, {}, "retraceable momentum", T),
    "reversible": (gh.reversible(T), gh.ReversibleOptimizer, {}, "reversible", T),
    "forward": (gh.forward(T), gh.ForwardOptimizer, {}, "adamw", T),
    "drmad": (gh.drmad(1), gh.DrMADOptimizer, {}, "adamw", 1),
    "one_step": (gh.one_step(), gh.OneStepOptimizer, {}, "adamw", 1),
    "greedy": (gh.greedy(0.9, 1), gh.GreedyOptimizer, {"unroll_steps": 1}, "adamw", 1),
}
TOLERANCE = 1e-9


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_agree_with_the_training_written_out(name):
    estimator, make, settings, optimizer, steps = EXACT[name]
    data, lam = window(steps), tuned(optimizer)
    given, _ = OPTIMIZERS[optimizer]
    (value, (w, m)), want = jax.value_and_grad(written_out(optimizer, data), has_aux=True)(lam)

    dynamics = gh.from_optax(train_loss, given)
    params, model_state = network()
    inner = dynamics.init(params, lam)._replace(model_state=model_state)
    problem = gh.BilevelProblem(dynamics, val_loss)
    memory = estimator.init(inner, lam, data)
    got = jax.jit(estimator.estimate, static_argnums=0)(problem, memory, inner, lam, data)
    assert_trees_close(got.hypergrad, want, TOLERANCE)
    assert_trees_close(got.info["val_loss"], value, TOLERANCE)
    assert_trees_close(got.inner.params, w, TOLERANCE)
    same_state(got.inner.model_state["key"], m["key"])

    opt = make(inner_optimizer=given, outer_optimizer=READ, T=steps, loop="scan", **settings)
    state = opt.run(
        opt.init(params, lam, model_state=model_state),
        1,
        get_train_batch=InOrder(data.train),
        get_val_batch=InOrder(data.val),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )
    assert_trees_close(state.outer_opt_state, want, TOLERANCE)
    assert_trees_close(state.model_state["mean"], m["mean"], TOLERANCE)


@pytest.mark.parametrize("name", ["reverse", "segments", "forward", "drmad", "one_step", "greedy"])
def test_an_update_fn_that_carries_the_model_state(name):
    estimator, _, _, optimizer, steps = EXACT[name]
    data, lam = window(steps), tuned(optimizer)
    want = jax.grad(lambda lam: written_out(optimizer, data)(lam)[0])(lam)

    def update_fn(p, lam, batch, m):
        g, (m, _) = jax.grad(train_loss, has_aux=True)(p["w"], lam, batch, m)
        updates, z = adamw(lam).update(g, p["z"], p["w"])
        return {"w": optax.apply_updates(p["w"], updates), "z": z}, m

    def judge(p, lam, batch, m):
        return val_loss(p["w"], lam, batch, m)

    w, model_state = network()
    dynamics = gh.from_update(update_fn)
    inner = dynamics.init({"w": w, "z": adamw(lam).init(w)}, lam)
    inner = inner._replace(model_state=model_state)
    problem = gh.BilevelProblem(dynamics, judge)
    memory = estimator.init(inner, lam, data)
    got = jax.jit(estimator.estimate, static_argnums=0)(problem, memory, inner, lam, data)
    assert_trees_close(got.hypergrad, want, TOLERANCE)


def test_the_derivative_through_the_statistics_is_another():
    """The control: a reference that differentiates the model state does not agree."""
    constant, through = (
        jax.grad(lambda lam, d=d: written_out("adamw", window(), differentiate_state=d)(lam)[0])(
            tuned("adamw")
        )
        for d in (False, True)
    )
    apart = jax.tree.map(lambda a, b: abs(a - b), constant, through)
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_metrics_of_the_losses_are_reported_and_logged(tmp_path):
    data, lam = window(), tuned("adamw")
    params, model_state = network()
    opt = gh.OneStepOptimizer(inner_optimizer=adamw, outer_optimizer=READ, T=T)
    state = opt.init(params, lam, model_state=model_state)
    with JSONLinesLogger(tmp_path / "log.jsonl") as logger:
        after = opt.run(
            state,
            1,
            get_train_batch=InOrder(data.train),
            get_val_batch=InOrder(data.val),
            train_loss_fn=train_loss,
            val_loss_fn=val_loss,
            callback=log_callback(logger),
        )
    # By hand: the training metrics at w_{T-1}, those of the validation after the last step.
    before = written_out("adamw", Window(*jax.tree.map(lambda x: x[:-1], tuple(data))))(lam)[1]
    batch, last = (jax.tree.map(lambda x: x[-1], side) for side in data)
    loss, (_, train) = train_loss(before[0], lam, batch, before[1])
    _, (w, m) = written_out("adamw", data)(lam)
    value, val = val_loss(w, lam, last, m)
    want = {"train_loss": loss, "val_loss": value, "train_accuracy": train["accuracy"]}
    want["val_accuracy"] = val["accuracy"]
    record = (tmp_path / "log.jsonl").read_text()
    for name, x in want.items():
        np.testing.assert_allclose(after.metadata[name], x, rtol=1e-9)
        assert f'"{name}"' in record


@pytest.mark.parametrize("name", ["one_step", "reverse"])
def test_the_model_state_is_that_of_plain_training(name):
    """Bit for bit: nothing that a method evaluates on the way advances it."""
    _, make, settings, _, _ = EXACT[name]
    data, lam = window(), tuned("adamw")
    params, m = network()
    opt = make(inner_optimizer=adamw, outer_optimizer=READ, T=T, loop="scan", **settings)
    state = opt.run(
        opt.init(params, lam, model_state=m),
        1,
        get_train_batch=InOrder(data.train),
        get_val_batch=InOrder(data.val),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )
    dynamics = gh.from_optax(train_loss, adamw)
    inner = dynamics.init(params, lam)._replace(model_state=m)
    step = jax.jit(dynamics.step)
    for t in range(T):
        inner = step(inner, lam, jax.tree.map(lambda x: x[t], data.train))  # noqa: B023
    same_state(state.model_state["key"], inner.model_state["key"])
    assert_trees_close(state.model_state["var"], inner.model_state["var"], 1e-13)


# -- where implicit and single-loop methods evaluate -----------------------------------------------


def counted_loss(w, lam, batch, count):
    """`H = 1` and `M = -(1 + count)`: the hypergradient tells the model state that it is of."""
    return jnp.sum(0.5 * w**2 - (1 + count) * w * lam + 0.0 * batch), (count + 1, {"count": count})


def judged_loss(w, lam, batch, count):
    return jnp.sum(0.5 * (w - batch) ** 2), {"count": count}


RHO = 0.1


@pytest.mark.parametrize(
    "name, u, count",  # of the second update: u in multiples of alpha, the count it is taken at
    [("soba", RHO, 1), ("implicit", 1, 2), ("amigo", None, 2), ("stocbio", RHO, 2)],
)
def test_products_are_taken_at_the_documented_model_state(name, u, count):
    """SOBA at the model state before the step, the others at that after it."""
    estimator = {
        "soba": gh.soba(RHO),
        "implicit": gh.implicit(unroll_steps=1),
        "amigo": gh.amigo(1, u_steps=1, step_size=RHO),
        "stocbio": gh.stocbio(1, terms=0, step_size=RHO),
    }[name]
    dynamics = gh.from_optax(counted_loss, optax.sgd(0.0))  # w stays
    problem = gh.BilevelProblem(dynamics, judged_loss)
    w, lam, batch = jnp.array(2.0), jnp.array(0.5), jnp.array([1.0])
    inner = dynamics.init(w, lam)._replace(model_state=jnp.array(0))
    data = Window(batch, batch)
    memory = estimator.init(inner, lam, data)
    for _ in range(2):
        got = estimator.estimate(problem, memory, inner, lam, data)
        memory, inner = got.memory, got.inner
    assert int(inner.model_state) == 2
    alpha = 2.0 - 1.0
    u = RHO + (1 - RHO) * RHO if u is None else u  # AmIGO's u has taken two steps
    np.testing.assert_allclose(got.hypergrad, u * alpha * (1 + count), rtol=1e-9)


SETTINGS = {
    "saba": {"train_batches": T, "val_batches": T, "index": lambda batch: batch[2]},
    "f2sa": {"unroll_steps": 2},
    "amigo": {"unroll_steps": 2, "u_steps": 2},
    "stocbio": {"unroll_steps": 2},
    "es": {"pairs": 2},
}
OTHERS = {
    "saba": gh.SABAOptimizer,
    "f2sa": gh.F2SAOptimizer,
    "soba": gh.SOBAOptimizer,
    "amigo": gh.AmIGOOptimizer,
    "stocbio": gh.StocBiOOptimizer,
    "implicit": gh.ImplicitOptimizer,
    "hyperdistill": gh.OnlineHypergradientOptimizer,
    "t1t2": gh.T1T2Optimizer,
    "es": gh.ESOptimizer,
}


def of_part(loss):
    return lambda w, lam, batch, state: loss(w, lam, batch[:2], state)


PART_LOSSES = of_part(train_loss), of_part(val_loss)


@pytest.mark.filterwarnings("ignore:.*NEGATIVE_CURVATURE")  # four steps reach no minimum
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method_runs_and_advances_the_model_state(name):
    parts = [np.arange(T)] if name == "saba" else []  # it has to know which batch it is given
    train, val = (InOrder((*side, *parts)) for side in window())
    lam = {k: tuned("adamw")[k] for k in ("smooth", "noise")}  # a minimum depends on no rate
    params, m = network()
    opt = OTHERS[name](
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
        T=T,
        loop="scan",  # in place of unrolled convolutions, which take long to compile
        **SETTINGS.get(name, {}),
    )
    state = opt.run(
        opt.init(params, lam, model_state=m),
        1,
        get_train_batch=train,
        get_val_batch=val,
        train_loss_fn=PART_LOSSES[0],
        val_loss_fn=PART_LOSSES[1],
    )
    assert np.isfinite(state.metadata["hypergrad_norm"]) and state.metadata["n_rejected"] == 0
    key = m["key"]
    for _ in range(T):
        key = jax.random.split(key, 3)[0]
    same_state(state.model_state["key"], key)
    assert 0 <= state.metadata["train_accuracy"] <= 1


# -- wrong use -------------------------------------------------------------------------------------


def scalar_alone(w, lam, batch, state):
    return train_loss(w, lam, batch, state)[0]


def three_arguments(w, lam, batch):
    return jnp.sum(w["head"]["bias"] ** 2)


def with_metrics(metrics):
    return lambda w, lam, batch, state: (train_loss(w, lam, batch, state)[0], (state, metrics))


def another_structure(w, lam, batch, state):
    loss, (state, metrics) = train_loss(w, lam, batch, state)
    return loss, ({**state, "count": jnp.zeros(())}, metrics)


def a_longer_mean(w, lam, batch, state):
    loss, (state, metrics) = train_loss(w, lam, batch, state)
    return loss, ({**state, "mean": jnp.zeros(3)}, metrics)


WRONG = {  # training loss, whether there is a model state, what the message says
    "scalar": (scalar_alone, True, r"must return \(loss, \(model_state, metrics\)\)"),
    "three arguments": (three_arguments, True, r"called with four arguments.*given to init"),
    "no state": (train_loss, False, r"called with three arguments.*init\(\.\.\., model_state="),
    "a vector": (with_metrics({"acc": np.zeros(5)}), True, r"'acc'.*scalar.*Reduce it.*jnp\.mean"),
    "no dictionary": (with_metrics(0.5), True, "dictionary of scalars"),
    "a truth value": (with_metrics({"acc": True}), True, r"'acc'.*must be a number.*jnp\.float32"),
    "a word": (with_metrics({"acc": "good"}), True, "'acc'.*must be a number, but is str"),
    "nothing": (with_metrics({"acc": None}), True, "'acc'.*must be a number, but is NoneType"),
    "nested": (with_metrics({"acc": {"top": 1.0}}), True, "'acc'.*must be a number.*a dictionary"),
    "a complex number": (with_metrics({"acc": np.complex64(1j)}), True, "'acc'.*but is complex64"),
    "no name": (with_metrics({1: 0.5}), True, "need names of text, but one is 1"),
    "the loss's own name": (with_metrics({"loss": 0.5}), True, "called 'loss'.*another name"),
    "another structure": (another_structure, True, r"\['count'\]"),
    "another shape": (a_longer_mean, True, r"leaf .*mean.*\[2\] to .*\[3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_names_the_remedy(name):
    loss, stateful, message = WRONG[name]
    data, lam = window(1), tuned("adamw")
    params, m = network()
    opt = gh.OneStepOptimizer(inner_optimizer=adamw, outer_optimizer=READ, T=1)
    state = opt.init(params, lam, model_state=m) if stateful else opt.init(params, lam)
    judge = val_loss if stateful else (lambda w, lam, batch: jnp.sum(w["head"]["bias"]))
    with pytest.raises((TypeError, ValueError)) as caught:
        opt.run(
            state,
            1,
            get_train_batch=InOrder(data.train),
            get_val_batch=InOrder(data.val),
            train_loss_fn=loss,
            val_loss_fn=judge,
        )
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, text, re.DOTALL), text
