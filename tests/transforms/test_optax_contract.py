"""What Optax asks of every optimizer, asked of everything in `gradhpo.transforms`.

One table; an export that is not in it fails a test. Optax's suites have the same questions
(map_params, inject_hyperparams, groups, extra arguments, dtypes, no recompilation) for theirs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import BilevelProblem, Window, from_optax, transforms
from gradhpo.estimators.reverse import reverse
from gradhpo.testing import assert_trees_close, unrolled_loss
from gradhpo.transforms import (
    adam,
    adam_hd,
    adamw_hd,
    decay_by_tree,
    hypergradient_descent,
    hypergradient_status,
    learning_rates,
    momentum_sgd,
    reversible_sgd,
    scale_by_tree,
    sgd_hd,
)


class Row(NamedTuple):
    make: Callable[..., Any]
    settings: dict[str, Any]
    plain: Callable[..., optax.GradientTransformation] | None = None  # Optax's own, if it has it
    needs_params: bool = False


TABLE = {
    "momentum_sgd": Row(momentum_sgd, {"learning_rate": 0.1}, partial(optax.sgd, momentum=0.9)),
    "adam": Row(adam, {"learning_rate": 0.1}, partial(optax.adam, eps_root=1e-8)),
    "reversible_sgd": Row(  # 1 - momentum is 1/4; both are exact in every dtype
        reversible_sgd,
        {"learning_rate": 0.1, "momentum": 0.75},
        lambda rate: optax.chain(optax.scale(0.25), optax.sgd(rate, 0.75)),
    ),
    "scale_by_tree": Row(scale_by_tree, {"step_sizes": {"a": -0.1, "b": -0.1}}, optax.sgd),
    "decay_by_tree": Row(
        decay_by_tree,
        {"decays": {"a": 0.1, "b": 0.1}},
        optax.add_decayed_weights,
        needs_params=True,
    ),
    "sgd_hd": Row(sgd_hd, {"learning_rate": 0.1, "hypergradient_lr": 1e-3}),
    "sgd_hd: momentum, penalty": Row(
        sgd_hd,
        {
            "learning_rate": 0.1,
            "hypergradient_lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "floor": 1e-3,
        },
        needs_params=True,
    ),
    "adam_hd: a rate per parameter": Row(
        adam_hd,
        {
            "learning_rate": 0.1,
            "hypergradient_lr": 0.02,
            "rule": "multiplicative",
            "scope": "parameter",
        },
    ),
    "adamw_hd": Row(adamw_hd, {"learning_rate": 0.1, "hypergradient_lr": 1e-3}, needs_params=True),
    "hypergradient_descent: a rate per leaf": Row(
        partial(hypergradient_descent, optax.lion(1.0, weight_decay=0.0)),
        {"learning_rate": 0.1, "hypergradient_lr": 1e-3, "scope": "leaf"},
        needs_params=True,
    ),
    "hypergradient_descent: a stack": Row(
        partial(hypergradient_descent, optax.sgd(1.0), hypergradient_lr=sgd_hd(1e-3, 1e-5)),
        {"learning_rate": 0.1},
    ),
}
EVERY = pytest.mark.parametrize("name", TABLE)
LEARNED = [name for name in TABLE if "_hd" in name or "hypergradient" in name]
PLAIN = [name for name in TABLE if TABLE[name].plain]
BY_TREE = ("scale_by_tree", "decay_by_tree")  # of the parameters, by their names
READERS = {"HypergradientDescentState", "hypergradient_status", "learning_rates"}

W = {"a": np.array([1.0, -2.0, 0.5], np.float32), "b": np.array([[0.3, 0.7]], np.float32)}


def optimizer(name):
    return TABLE[name].make(**TABLE[name].settings)


def params(dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), W)


def gradient(w, t):
    return jax.tree.map(lambda x: jnp.cos(x + t).astype(x.dtype), w)


def train(opt, w, steps=3, **extra):
    """`[(updates, state), …]` of a few steps, by plain calls."""
    state, history = opt.init(w), []
    for t in range(steps):
        updates, state = opt.update(gradient(w, t), state, w, **extra)
        history.append((updates, state))
        w = optax.apply_updates(w, updates)
    return history


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_everything_exported_is_in_the_table():
    makers = {getattr(row.make, "func", row.make).__name__ for row in TABLE.values()}
    outer = {"TopKState", "top_k", *transforms.proximal.__all__}  # of lam, and no Optax updates
    assert makers | READERS | outer == set(transforms.__all__)


@EVERY
def test_map_params_finds_the_slots_like_the_parameters_and_no_others(name):
    opt, w = optimizer(name), params()
    names = jax.tree.map(lambda x: f"like {x.shape}", w)
    state = opt.init(w)
    found = optax.tree.map_params(
        opt, lambda _, like: like, state, names, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(found) == jax.tree.structure(state)
    rates = jax.tree.leaves(getattr(state, "learning_rate", None))  # per leaf: scalars in a tree
    for like, leaf in zip(*map(jax.tree.leaves, (found, state)), strict=True):
        if not any(leaf is rate for rate in rates):
            assert (like == f"like {leaf.shape}") == (leaf.ndim > 0)
    equal(optax.tree.map_params(opt, lambda x: x, state), state)


@EVERY
def test_hyperparameters_can_be_injected(name):
    """The same updates and slots, traced; as Optax asks of its own."""
    make, settings, *_ = TABLE[name]
    opt, w = optimizer(name), params()
    injected = optax.inject_hyperparams(make)(**settings)
    state = injected.init(w)
    assert avals(jax.eval_shape(injected.init, w)) == avals(state)
    traced = jax.eval_shape(injected.update, w, state, w)
    assert avals(traced[1].inner_state) == avals(opt.init(w))
    numbers = {key for key, value in settings.items() if isinstance(value, float)}
    assert numbers <= set(state.hyperparams)
    for (updates, inner), (got, outer) in zip(train(opt, w), train(injected, w), strict=True):
        assert_trees_close((got, outer.inner_state), (updates, inner), 1e-5)


@EVERY
def test_a_group_may_be_empty(name):
    opt, w = optimizer(name), params()
    groups = optax.multi_transform(
        {"one": opt, "none": optimizer(name)}, jax.tree.map(lambda _: "one", w)
    )
    history = train(groups, w)
    for (got, _), (updates, _) in zip(history, train(opt, w), strict=True):
        equal(got, updates)
    if name in LEARNED:
        _, state = history[-1]
        status = hypergradient_status(state).splitlines()
        assert len(status) == len(learning_rates(state)) == 2 * len(learning_rates(opt.init(w)))
        assert all("finite, " in line or "no parameters" in line for line in status)
    parts = optax.multi_transform({"one": opt, "two": optimizer(name)}, {"a": "one", "b": "two"})
    for (got, _), (alone, _) in zip(train(parts, w), train(opt, w), strict=True):
        if name not in LEARNED:  # one learned rate becomes two
            equal(got, alone)
    assert jax.tree.leaves(opt.update({}, opt.init({}), {})[0]) == []


WRAPPERS = {
    "chain": lambda opt: optax.chain(optax.identity(), opt),
    "named_chain": lambda opt: optax.named_chain(("it", opt)),
    "masked": lambda opt: optax.masked(opt, {"a": True, "b": True}),
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 2),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 1).gradient_transformation(),
    "conditionally_mask": lambda opt: optax.conditionally_mask(opt, lambda step: step >= 0),
    "flatten": optax.flatten,
}


@EVERY
def test_wrappers_keep_the_state_and_change_nothing(name):
    """Each alone by its shapes; all around each other in one program, by its numbers."""
    w, nested = params(), optimizer(name)
    for key, wrap in WRAPPERS.items():
        if key == "flatten" and name in BY_TREE:
            continue
        opt = wrap(optimizer(name))
        start = opt.init(w)
        updates, state = jax.eval_shape(opt.update, w, start, w)
        assert avals((updates, state)) == avals((w, start)), key
        nested = nested if key == "flatten" else wrap(nested)
    ahead, both = optax.lookahead(optimizer(name), 2, 0.5), optax.LookaheadParams.init_synced(w)
    assert avals(jax.eval_shape(ahead.update, w, ahead.init(both), both)[0]) == avals(both)
    got = jax.jit(lambda: [updates for updates, _ in train(nested, w)])()
    for updates, (want, _) in zip(got, train(optimizer(name), w), strict=True):
        assert_trees_close(updates, want, 1e-4)  # float32, op by op


@EVERY
def test_steps_share_one_program_and_take_extra_arguments(name, compilations):
    opt, w = optimizer(name), params()
    want = train(opt, w)

    @jax.jit
    def step(w, state, t):
        updates, state = opt.update(gradient(w, t), state, w, value=t, nobody_expects=1.0)
        return optax.apply_updates(w, updates), state, updates

    carry = jax.jit(opt.init)(w)
    w, carry, _ = step(w, carry, 0)
    before = compilations()
    for t in (1, 2):
        w, carry, updates = step(w, carry, t)
    assert compilations() == before
    assert_trees_close((updates, carry), want[-1], 1e-4)  # float32, op by op


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@EVERY
def test_state_and_updates_keep_shapes_and_dtypes(name, dtype, x64):
    opt, w = optimizer(name), params(dtype)
    start = jax.eval_shape(opt.init, jax.eval_shape(lambda: w))
    assert avals(start) == avals(opt.init(w))
    updates, state = jax.eval_shape(opt.update, w, start, w)
    assert avals(state) == avals(start)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@EVERY
def test_vmap_is_a_loop(name):
    opt, w = optimizer(name), params()
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), w)

    def first(w):
        return opt.update(gradient(w, 1), opt.init(w), w)

    got = jax.vmap(first)(both)
    for i in range(2):
        want = first(jax.tree.map(lambda x: x[i], both))  # noqa: B023
        assert_trees_close(jax.tree.map(lambda x: x[i], got), want, 1e-6)  # noqa: B023


@EVERY
def test_none_stays_none_and_parameters_are_asked_for_only_where_used(name):
    opt, w = optimizer(name), {"a": params()["a"], "b": None}
    updates, _ = opt.update(w, opt.init(w), w)
    assert updates["b"] is None
    if TABLE[name].needs_params:
        with pytest.raises(ValueError, match="not passing `params`"):
            opt.update(w, opt.init(w))
    else:
        equal(opt.update(w, opt.init(w))[0], updates)


@EVERY
def test_complex_parameters_are_trained_or_refused_with_a_remedy(name):
    opt = optimizer(name)
    w = {"a": jnp.array([1.0 + 2.0j, -0.5j], jnp.complex64), "b": jnp.ones(1, jnp.complex64)}
    if name in LEARNED:
        with pytest.raises(TypeError, match=r"\['a'\] is complex64; .*split_real_and_imaginary"):
            opt.init(w)
        opt = optax.contrib.split_real_and_imaginary(opt)
    history = train(opt, w)
    assert {x.dtype for x in jax.tree.leaves(history[-1][0])} == {jnp.dtype("complex64")}
    if name in PLAIN:
        for (got, _), (want, _) in zip(history, train(TABLE[name].plain(0.1), w), strict=True):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), got, want)


# -- trees -------------------------------------------------------------------------------------


class Layers(NamedTuple):
    hidden: Any
    head: Any


BY_NAME = {
    "a value for all": 2.0,
    "layers": {"hidden": 2.0, "head": {"bias": 2.0, "kernel": 2.0}},
    "a tuple": Layers(2.0, 2.0),
    "parameters": Layers({"kernel": 2.0}, {"kernel": np.full(2, 2.0), "bias": 2.0}),
    "too many": {"hidden": 2.0, "head": 2.0, "masked": 3.0},
}


@pytest.mark.parametrize("tree", BY_NAME.values(), ids=BY_NAME)
def test_numbers_belong_to_parameters_by_name_whatever_holds_them(tree):
    w = Layers({"kernel": jnp.ones(2)}, {"bias": jnp.ones(()), "kernel": jnp.ones(2)})
    as_dictionary = {"hidden": w.hidden, "head": w.head}
    for params in w, as_dictionary:
        updates, _ = scale_by_tree(tree).update(params, optax.EmptyState())
        equal(updates, optax.tree.scale(2.0, params))
        updates, _ = decay_by_tree(tree).update(params, optax.EmptyState(), params)
        equal(updates, optax.tree.scale(3.0, params))


def test_a_tree_of_an_nnx_or_equinox_module():
    nnx, eqx = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")
    module = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    for params, kernel in (module, "kernel"), (linear, "weight"):
        for tree in {kernel: 2.0, "bias": 0.0}, jax.tree.map(jnp.zeros_like, params):
            updates, _ = scale_by_tree(tree).update(params, optax.EmptyState())
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            same = isinstance(tree, dict)
            want = getattr(params, kernel)[...] * (2.0 if same else 0.0)
            equal(getattr(updates, kernel)[...], want)


@pytest.mark.parametrize("make", [scale_by_tree, decay_by_tree])
def test_a_parameter_without_a_number_is_named(make):
    with pytest.raises(ValueError, match="nothing for the parameter b: .*There is a, c/d"):
        make({"a": 1.0, "c": {"d": 1.0}}).update(params(), optax.EmptyState(), params())


# -- schedules ---------------------------------------------------------------------------------

SCHEDULED = [name for name in PLAIN if name not in BY_TREE]


def decay(count):
    return 0.1 / (1.0 + count)


@pytest.mark.parametrize("shape", [(3, 2), (3,), (1, 2)])
def test_a_number_that_does_not_broadcast_is_named(shape):
    """In silence it would change the shape of the parameter."""
    params = {"layer": {"bias": jnp.ones(2)}}
    opt = scale_by_tree({"layer": jnp.ones(shape)})
    with pytest.raises(ValueError, match=r"layer/bias have the shape .*, which does not broadcast"):
        opt.update(params, opt.init(params))


@pytest.mark.parametrize("rate", [0.1, decay], ids=["number", "schedule"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_steps_are_those_of_optax_and_can_be_told_from_the_slots(name, rate, x64):
    make, settings, plain, _ = TABLE[name]
    opt, w = make(**{**settings, "learning_rate": rate}), params(jnp.float64)
    for (got, state), (want, _) in zip(train(opt, w), train(plain(rate), w), strict=True):
        assert_trees_close(got, want, 1e-13)
        equal(opt.last_updates(state), got)


@pytest.mark.parametrize("name", ["sgd_hd", "adamw_hd"])
def test_a_schedule_of_a_learned_rate_is_pointed_to_its_place(name):
    with pytest.raises(TypeError, match="pass it as schedule="):
        TABLE[name].make(decay, 1e-3)


def test_schedule_of_trees(x64):
    """One rate per leaf and step, from a count that stands in the slots."""
    rates = {"a": 1.0, "b": 2.0}
    opt = momentum_sgd(lambda count: optax.tree.scale(decay(count), rates), 0.9)
    plain = optax.chain(optax.trace(0.9), scale_by_tree(rates), optax.scale_by_learning_rate(decay))
    w = params(jnp.float64)
    for (got, _), (want, _) in zip(train(opt, w), train(plain, w), strict=True):
        assert_trees_close(got, want, 1e-13)


FACTORIES = {
    "momentum_sgd": (
        lambda lam: momentum_sgd(lambda t: jnp.exp(lam["rate"])[t], lam["decay"]),
        lambda lam: optax.sgd(lambda t: jnp.exp(lam["rate"])[t], lam["decay"]),
    ),
    "adam": (
        lambda lam: adam(lambda t: jnp.exp(lam["rate"])[t], lam["decay"]),
        lambda lam: optax.adam(lambda t: jnp.exp(lam["rate"])[t], lam["decay"], eps_root=1e-8),
    ),
}


@pytest.mark.parametrize("memory", ["trajectory", "segments"])
@pytest.mark.parametrize("name", FACTORIES)
def test_reverse_mode_is_exact_through_a_schedule(name, memory, x64):
    """The rate of every step is a hyperparameter; weights are taken back at the rate they moved."""
    steps = 6

    def train_loss(w, lam, x):
        return jnp.sum(jnp.sin(w * x)) + jnp.exp(lam["decay"]) * jnp.sum(w**2)

    def problem(factory):
        return BilevelProblem(
            from_optax(train_loss, factory), lambda w, lam, x: jnp.sum((w - x) ** 2)
        )

    ours, optaxs = (problem(factory) for factory in FACTORIES[name])
    lam = {"rate": jnp.linspace(-3.0, -1.0, steps), "decay": jnp.asarray(0.8)}
    window = Window(*jnp.cos(jnp.arange(8.0 * steps)).reshape(2, steps, 4))
    w, estimator = jnp.linspace(-1.0, 1.0, 4), reverse(steps, memory=memory)
    got = jax.jit(partial(estimator.estimate, ours))((), ours.dynamics.init(w, lam), lam, window)
    want = jax.jit(
        jax.grad(lambda lam: unrolled_loss(optaxs, optaxs.dynamics.init(w, lam), lam, window))
    )(lam)
    assert_trees_close(got.hypergrad, want, 1e-11)
    assert np.all(np.abs(got.hypergrad["rate"]) > 1e-4)
