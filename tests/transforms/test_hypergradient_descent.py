"""Hypergradient descent: equations, exact limits, company of other transformations, failures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo.transforms import (
    HypergradientDescentState,
    adam_hd,
    adamw_hd,
    hypergradient_descent,
    hypergradient_status,
    learning_rates,
    sgd_hd,
)
from gradhpo.utils.finite_differences import central_difference

ETA, BETA, MU, STEPS = 0.05, 1e-3, 0.9, 6
rate_of = partial(optax.tree.get, key="learning_rate")


def params(dtype=float):
    return {"a": jnp.array([1.0, -2.0, 0.5], dtype), "b": jnp.array([[0.3], [0.7]], dtype)}


def loss(w, t):
    """Another loss at every step, neither quadratic nor separable."""
    x = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(w)])
    scales = jnp.cos(jnp.arange(x.size, dtype=x.dtype) + t) + 1.5
    return jnp.sum(scales * x**2) / 2 + jnp.sin(x.sum() + t) + x[0] * x[-1]


gradient = jax.jit(jax.grad(loss))


def train(opt, steps=STEPS, w=None):
    """Every `(w, state)` from the start, by plain calls."""
    w = params() if w is None else w
    history = [(w, opt.init(w))]
    for t in range(steps):
        w, state = history[-1]
        updates, state = opt.update(gradient(w, t), state, w)
        history.append((optax.apply_updates(w, updates), state))
    return history


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# The rates by the equations, in numpy.


def by_hand(direction, rule, steps=STEPS, s=lambda t: 1.0):
    """eta_1, eta_2, ... when `direction(g)` is d_t, with slots of its own."""
    w, unflatten = jax.flatten_util.ravel_pytree(params())
    eta, last, rates = ETA, np.zeros(w.size), []
    for t in range(steps):
        g = flat(gradient(unflatten(w), t))
        h = g @ last
        if rule == "additive":
            eta = eta - BETA * h
        elif last.any():
            eta = eta * (1 - BETA * h / (np.linalg.norm(g) * np.linalg.norm(last)))
        last = s(t) * direction(g)
        w = w + eta * last
        rates.append(eta)
    return np.array(rates)


def sgd_direction():
    return lambda g: -g


def nesterov_direction():
    v = 0.0

    def direction(g):
        nonlocal v
        v = MU * v + g
        return -(g + MU * v)

    return direction


def adam_direction():
    m, v, t = 0.0, 0.0, 0

    def direction(g):
        nonlocal m, v, t
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
        return -(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    return direction


FORMS = {
    "sgd": (sgd_hd, sgd_direction),
    "sgdn": (partial(sgd_hd, momentum=MU, nesterov=True), nesterov_direction),
    "adam": (adam_hd, adam_direction),
}


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize("form", FORMS)
def test_rates_equal_the_closed_form(form, rule, x64):
    make, direction = FORMS[form]
    got = [rate_of(state) for _, state in train(make(ETA, BETA, rule=rule))[1:]]
    np.testing.assert_allclose(got, by_hand(direction(), rule), rtol=1e-12)


def test_schedule_multiplies_the_step_and_its_derivative(x64):
    def schedule(count):
        return (count + 1) ** -0.5

    got = [rate_of(state) for _, state in train(adam_hd(ETA, BETA, schedule=schedule))[1:]]
    want = by_hand(adam_direction(), "additive", s=schedule)
    np.testing.assert_allclose(got, want, rtol=1e-12)


BASES = {
    "sgd": (optax.sgd, sgd_hd, {}),
    "sgdn": (optax.sgd, sgd_hd, {"momentum": MU, "nesterov": True}),
    "adam": (optax.adam, adam_hd, {"b1": 0.8, "eps_root": 1e-9}),
    "adamw": (optax.adamw, adamw_hd, {"weight_decay": 0.1}),
}


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("base", BASES)
def test_beta_zero_is_the_plain_optimizer_bit_for_bit(base, dtype, x64):
    plain, make, settings = BASES[base]
    for wrap in (jax.jit,) if dtype == "bfloat16" else (lambda f: f, jax.jit):
        runs = []
        for opt in (plain(0.03, **settings), make(0.03, 0.0, **settings)):

            @wrap
            def step(w, state, t, opt=opt):
                updates, state = opt.update(gradient(w, t), state, w)
                return optax.apply_updates(w, updates), state

            w = params(dtype)
            state = opt.init(w)
            for t in range(STEPS):
                w, state = step(w, state, t)
            runs.append(w)
        jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.optimised
def test_beta_zero_with_a_schedule_and_with_the_multiplicative_rule(x32):
    decay = optax.exponential_decay(1.0, 3, 0.5)
    want = train(optax.adam(lambda t: 0.03 * decay(t)))[-1][0]
    for rule in ("additive", "multiplicative"):
        got = train(adam_hd(0.03, 0.0, rule=rule, schedule=decay))[-1][0]
        jax.tree.map(np.testing.assert_array_equal, got, want)


# What h_t is.


def hypergradient(before, after):
    """h_t from two states of an additive transformation."""
    return (rate_of(before) - rate_of(after)) / BETA


@pytest.mark.parametrize("form", FORMS)
def test_h_is_the_derivative_of_two_steps_composed(form, x64):
    history = train(FORMS[form][0](ETA, BETA))
    for t in range(1, STEPS):
        (w, _), (_, state), (_, after) = history[t - 1], history[t], history[t + 1]
        direction = optax.tree.get(state, "direction")

        def composed(eta, w=w, d=direction, t=t):
            return loss(jax.tree.map(lambda x, y: x + eta * y, w, d), t)

        eta = rate_of(state)
        got = hypergradient(state, after)
        np.testing.assert_allclose(got, jax.grad(composed)(eta), rtol=1e-10)
        np.testing.assert_allclose(got, central_difference(composed, eta), rtol=1e-7)


@pytest.mark.parametrize("scope", ["leaf", "parameter"])
def test_narrower_scopes_are_derivatives_in_each_rate(scope, x64):
    history = train(adam_hd(ETA, BETA, scope=scope))
    (w, _), (_, state), (_, after) = history[2:5]

    def composed(eta):
        return loss(jax.tree.map(lambda x, r, d: x + r * d, w, eta, state.direction), 3)

    got = jax.tree.map(lambda a, b: (a - b) / BETA, rate_of(state), rate_of(after))
    want = jax.grad(composed)(state.learning_rate)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), got, want)


def test_parameter_scope_of_the_multiplicative_rule_takes_signs_only(x64):
    _, (_, first), (_, second) = train(sgd_hd(ETA, 0.1, rule="multiplicative", scope="parameter"))[
        :3
    ]
    factors = flat(second.learning_rate) / flat(first.learning_rate)
    np.testing.assert_allclose(np.abs(factors - 1), 0.1, rtol=1e-12)


@pytest.mark.optimised
def test_weight_decay_counts_as_part_of_the_loss(x64):
    """As in the authors' code; decoupled decay is part of the direction instead."""
    got = train(sgd_hd(ETA, BETA, weight_decay=0.1))[-1]
    w, (_, state) = train(optax.chain(optax.add_decayed_weights(0.1), sgd_hd(ETA, BETA)))[-1]
    jax.tree.map(np.testing.assert_array_equal, got, (w, state))
    assert rate_of(train(adamw_hd(ETA, BETA, weight_decay=0.1))[-1][1]) != pytest.approx(
        float(rate_of(train(adam_hd(ETA, BETA, weight_decay=0.1))[-1][1])), rel=1e-6
    )


def test_clipping_before_scales_h_and_scaling_after_leaves_it_short(x64):
    start, plain = optax.tree.get(train(sgd_hd(ETA, BETA), 1)[-1][1], "direction"), {}
    g = gradient(params(), 1)
    for name, chain in {
        "alone": sgd_hd(ETA, BETA),
        "clipped": optax.chain(optax.clip_by_global_norm(0.5), sgd_hd(ETA, BETA)),
        "scaled": optax.chain(sgd_hd(ETA, BETA), optax.scale(0.25)),
    }.items():
        state = optax.tree.set(chain.init(params()), direction=start)
        plain[name] = hypergradient(state, chain.update(g, state, params())[1])
    np.testing.assert_allclose(plain["clipped"], plain["alone"] * 0.5 / optax.tree.norm(g))
    # The weights move by a quarter of eta d, so the derivative in eta is a quarter of h.
    np.testing.assert_allclose(plain["scaled"], plain["alone"])


@pytest.mark.optimised
def test_without_momentum_sgdn_is_sgd_and_one_leaf_has_one_rate(x64):
    want = train(sgd_hd(ETA, BETA))
    got = train(sgd_hd(ETA, BETA, momentum=0.0, nesterov=True))
    jax.tree.map(np.testing.assert_array_equal, got[-1][0], want[-1][0])
    w = params()["a"]
    leaf, all_of_it = (train(sgd_hd(ETA, BETA, scope=s), w=w)[-1][0] for s in ("leaf", "global"))
    np.testing.assert_array_equal(leaf, all_of_it)


# The stack.


def test_stack_of_sgd_on_sgd_is_sgd_hd(x64):
    """Chandra et al.: eta's optimizer is SGD, which sees d loss / d eta through one update."""
    w, eta, before, rates = params(), jnp.asarray(ETA), None, []
    for t in range(STEPS):
        if before is not None:
            w_old, g_old = before

            def through_one_update(eta, w=w_old, g=g_old, t=t):
                return loss(jax.tree.map(lambda x, y: x - eta * y, w, g), t)

            eta = eta - BETA * jax.grad(through_one_update)(eta)
        g = gradient(w, t)
        before = w, g
        w = jax.tree.map(lambda x, y: x - eta * y, w, g)  # noqa: B023
        rates.append(eta)
    got = [rate_of(state) for _, state in train(sgd_hd(ETA, optax.sgd(BETA)))[1:]]
    np.testing.assert_allclose(got, rates, rtol=1e-12)


def test_three_levels_follow_the_derivatives_through_both_updates(x64):
    kappa = 1e-5
    states = [s for _, s in train(sgd_hd(ETA, sgd_hd(BETA, kappa)))]
    weights = [w for w, _ in train(sgd_hd(ETA, sgd_hd(BETA, kappa)))]
    for t in range(2, STEPS):
        old, new, after = states[t - 1], states[t], states[t + 1]
        h = flat(gradient(weights[t - 1], t - 1)) @ flat(old.direction)

        def composed(beta, w=weights[t - 1], old=old, new=new, h=h, t=t):
            eta = old.learning_rate - beta * h
            return loss(jax.tree.map(lambda x, d: x + eta * d, w, new.direction), t)

        rate, beta = learning_rates(new).values()
        _, next_beta = learning_rates(after).values()
        want = jax.grad(composed)(beta)
        np.testing.assert_allclose((beta - next_beta) / kappa, want, rtol=1e-8)
        assert rate != ETA
    tower = sgd_hd(ETA, adam_hd(BETA, sgd_hd(1e-6, optax.chain(optax.clip(1.0), optax.sgd(1e-9)))))
    assert [k.count("rate_state") for k in learning_rates(train(tower)[-1][1])] == [0, 1, 2]


# In company.


def test_any_optimizer_and_chain_masked_groups_multisteps(x64):
    frozen = {"a": True, "b": False}
    label = {"a": "fast", "b": "slow"}
    groups = optax.multi_transform(
        {"fast": sgd_hd(ETA, BETA), "slow": adam_hd(1e-3, 1e-7, scope="leaf")}, label
    )
    lion = hypergradient_descent(optax.lion(1.0), 1e-3, 1e-7)
    for opt, keys in (
        (lion, ["learning_rate"]),
        (optax.chain(optax.clip(1.0), adamw_hd(ETA, BETA)), ["[1].learning_rate"]),
        (optax.masked(sgd_hd(ETA, BETA, scope="leaf"), frozen), ["inner_state.learning_rate"]),
        (
            groups,
            [f"inner_states['{g}'].inner_state.learning_rate" for g in ("fast", "slow")],
        ),
        (optax.MultiSteps(sgd_hd(ETA, BETA), 2), ["inner_opt_state.learning_rate"]),
        (optax.apply_if_finite(sgd_hd(ETA, BETA), 3), ["inner_state.learning_rate"]),
    ):
        (_, start), *_, (_, end) = train(opt)
        assert list(learning_rates(end)) == keys
        moved = jax.tree.map(lambda a, b: bool(jnp.all(a != b)), *map(learning_rates, (start, end)))
        assert all(jax.tree.leaves(moved))


def test_masked_leaves_are_another_optimizers_business(x64):
    opt = optax.masked(sgd_hd(ETA, BETA), {"a": True, "b": False})
    w = params()
    updates, _ = opt.update(gradient(w, 0), opt.init(w), w)
    np.testing.assert_array_equal(updates["b"], gradient(w, 0)["b"])


@pytest.mark.parametrize("scope", ["global", "leaf", "parameter"])
def test_scan_and_vmap_and_jit_agree_with_a_loop(scope, compilations, x64):
    opt = sgd_hd(ETA, sgd_hd(BETA, 1e-6), momentum=MU, scope=scope)

    def step(carry, t):
        w, state = carry
        updates, state = opt.update(gradient(w, t), state, w)
        return (optax.apply_updates(w, updates), state), None

    def scanned(w):
        return jax.lax.scan(step, (w, opt.init(w)), jnp.arange(STEPS))[0]

    want = train(opt)[-1]
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, scanned(params()), want)
    double = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
    both = jax.jit(jax.vmap(scanned))(double)
    jax.tree.map(lambda x, y: close(x[0], y), both, want)
    one = jax.jit(step)
    carry = params(), opt.init(params())
    carry, _ = one(carry, 0)
    before = compilations()
    for t in range(1, 4):
        carry, _ = one(carry, t)
    assert compilations() == before  # structure, dtypes and weak types stay


def test_rates_may_be_traced(x64):
    """A grid over eta_0 and beta is one program."""

    def last(eta, beta):
        opt = sgd_hd(eta, beta, floor=0.0)
        return rate_of(train(opt, 3)[-1][1])

    got = jax.jit(jax.vmap(last))(jnp.array([0.1, 0.05]), jnp.array([0.0, BETA]))
    np.testing.assert_allclose(got, [0.1, last(0.05, BETA)], rtol=1e-12)


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_training_can_be_differentiated_in_its_settings(rule, x64):
    def end(settings):
        eta, beta = settings
        return loss(train(sgd_hd(eta, beta, rule=rule), 2)[-1][0], 2)

    at = jnp.array([ETA, BETA])
    value_and_grad = jax.jit(jax.value_and_grad(end))  # one compilation for both
    want = central_difference(lambda x: value_and_grad(x)[0], at)
    np.testing.assert_allclose(value_and_grad(at)[1], want, rtol=1e-6)


def test_bfloat16_parameters_have_a_float32_rate(x32):
    opt = sgd_hd(1e-3, 1e-5, momentum=MU)
    w, state = train(opt, w=params(jnp.bfloat16))[-1]
    assert {x.dtype for x in jax.tree.leaves(w)} == {jnp.dtype(jnp.bfloat16)}
    assert rate_of(state).dtype == jnp.float32
    assert state.direction["a"].dtype == jnp.bfloat16
    wide = rate_of(train(opt)[-1][1])
    assert rate_of(state) == pytest.approx(float(wide), rel=0.02) and rate_of(state) != 1e-3


def test_the_rate_can_be_set_by_hand():
    state = optax.chain(optax.clip(1.0), sgd_hd(ETA, BETA)).init(params())
    assert rate_of(optax.tree.set(state, learning_rate=0.5)) == 0.5
    assert isinstance(state[1], HypergradientDescentState)


# When it goes wrong.


def diverge(**settings):
    """A quadratic with curvature 1 and a beta that is far too large."""
    settings = {"hypergradient_lr": 10.0} | settings
    opt = sgd_hd(0.5, **settings)

    def step(carry, _):
        w, state = carry
        updates, state = opt.update(w, state, w)
        return (optax.apply_updates(w, updates), state), rate_of(state)

    w = jnp.ones(3, jnp.float32)
    return jax.lax.scan(step, (w, opt.init(w)), None, length=60)


def test_divergence_is_recorded_and_prevented(x32):
    (w, state), rates = diverge()
    first = int(state.first_bad_step)
    assert not np.isfinite(w).all() and np.isfinite(rates).all()
    assert 0 < first < 60 and (rates[first:] == rates[first - 1]).all()
    said = hypergradient_status(state)
    assert f"no finite new rate at step {first}" in said and "lower hypergradient_lr" in said
    clipped = optax.chain(optax.clip(0.01), optax.sgd(1.0))
    for remedy in (
        {"ceiling": 1.5, "floor": 0.0},
        {"rule": "multiplicative", "hypergradient_lr": 0.05},
        {"hypergradient_lr": clipped},
        {"hypergradient_lr": 0.01},
    ):
        (w, state), _ = diverge(**remedy)
        assert np.linalg.norm(w) < 1e-3 and state.first_bad_step == -1
        assert hypergradient_status(state).startswith("learning_rate: finite")


def test_a_nan_batch_leaves_the_rate_alone():
    opt = optax.apply_if_finite(sgd_hd(ETA, BETA), 5)
    w, state = train(opt)[-1]
    bad = jax.tree.map(lambda x: x * jnp.nan, w)
    updates, after = opt.update(bad, state, w)
    assert not flat(updates).any() and rate_of(after) == rate_of(state)
    updates, after = (alone := sgd_hd(ETA, BETA)).update(bad, alone.init(w))
    assert np.isnan(flat(updates)).all() and after.first_bad_step == 0  # passed on, as by SGD
    assert rate_of(after) == np.float32(ETA)


def test_bounds_hold_and_a_negative_rate_is_mentioned(x64):
    uphill = jnp.array([1.0, 0.0])
    for floor, want in ((None, -0.4), (0.01, 0.01)):
        opt = sgd_hd(0.1, 0.5, floor=floor)
        _, state = opt.update(uphill, opt.init(uphill))
        _, state = opt.update(-uphill, state)
        assert state.learning_rate == pytest.approx(want)
        assert ("negative" in hypergradient_status(state)) == (floor is None)
    opt = sgd_hd(0.1, 0.5, ceiling=0.2)
    _, state = opt.update(uphill, opt.init(uphill))
    assert opt.update(uphill, state)[1].learning_rate == 0.2


WRONG = [
    (ValueError, "rule must be one of", lambda: sgd_hd(0.1, 0.1, rule="relative")),
    (ValueError, "scope must be one of", lambda: sgd_hd(0.1, 0.1, scope="layer")),
    (TypeError, "such as optax.sgd", lambda: hypergradient_descent(optax.adam, 0.1, 0.1)),
    (TypeError, "or a number", lambda: sgd_hd(0.1, optax.sgd)),
    (TypeError, "hypergradient_lr must be a number", lambda: sgd_hd(0.1, [0.1])),
    (TypeError, "pass it as schedule=", lambda: sgd_hd(optax.constant_schedule(0.1), 0.1)),
    (TypeError, "learning_rate must be a number", lambda: sgd_hd(None, 0.1)),
    (ValueError, "learning_rate must be finite", lambda: sgd_hd(np.nan, 0.1)),
    (ValueError, "at least 0", lambda: adam_hd(-0.1, 0.1)),
    (ValueError, "cannot leave 0", lambda: sgd_hd(0.0, 0.1, rule="multiplicative")),
    (ValueError, "must not be negative", lambda: sgd_hd(0.1, -1e-3)),
    (ValueError, "must be below 1", lambda: sgd_hd(0.1, 1.0, rule="multiplicative")),
    (ValueError, "between floor and ceiling", lambda: sgd_hd(0.1, 0.1, floor=0.2)),
    (TypeError, "schedule must be a function", lambda: sgd_hd(0.1, 0.1, schedule=0.5)),
    (TypeError, r"\['n'\] is int32", lambda: sgd_hd(0.1, 0.1).init({"n": np.int32(1)})),
    (TypeError, "split_real", lambda: sgd_hd(0.1, 0.1).init(np.zeros(1, np.complex64))),
    (ValueError, "no rate learned", lambda: learning_rates(optax.adam(0.1).init(jnp.ones(2)))),
]


@pytest.mark.parametrize("error, message, call", WRONG, ids=[row[1] for row in WRONG])
def test_wrong_use_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
