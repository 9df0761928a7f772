"""Faults 36 to 46: NaN, divergence, systems without an answer, limits, counters."""

import inspect
import warnings
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import METHODS, method, sgd, start

from gradhpo import (
    BilevelProblem,
    GradhpoWarning,
    InnerState,
    InOrder,
    Status,
    Task,
    Window,
    bilevel_step,
    discounted_sum,
    finite_difference,
    from_optax,
    from_update,
    greedy,
    hyperdistill,
    init_state,
    linearize,
    one_step,
    reverse,
    run_episode,
    spaces,
    status_message,
    tune,
)
from gradhpo.core.dynamics import zero_cotangent
from gradhpo.utils.gradients import tree_is_finite

UPDATES, BAD = 3, 1  # of a short training; the one that meets the fault


def smooth(w, lam, batch):
    pull = 0.1 * jnp.exp(jnp.sum(lam["rate"])) * jnp.sum(w["w"] ** 2)
    return jnp.mean((w["w"] - batch["x"]) ** 2) * jnp.exp(jnp.sum(lam["scale"])) / 2 + pull


def kinked(w, lam, batch):
    """Small and smooth, but where `root` is zero its gradient is NaN, and where `bend` is zero its
    second derivative; the value is finite."""
    inside = jnp.sum(w["w"] ** 2) + jnp.sum(lam["scale"] ** 2) + jnp.sum(lam["rate"] ** 2)
    return 1e-3 * jnp.sqrt(batch["root"] * inside) + 1e-3 * (batch["bend"] * inside) ** 1.5


def train_loss(w, lam, batch):
    return smooth(w, lam, batch) + kinked(w, lam, batch)


def val_loss(w, lam, batch):
    direct = 0.1 * jnp.sin(jnp.sum(lam["rate"] + lam["scale"]))
    return jnp.mean((w["w"] - batch["x"]) ** 2) + direct + kinked(w, lam, batch)


FAULTS = {  # side of the data, entry of its batch, what stands there, what comes of it
    "none": ("train", "root", 1.0, Status.OK),
    "train batch": ("train", "x", np.nan, Status.NONFINITE_TRAIN_STATE),
    "validation batch": ("val", "x", np.nan, Status.NONFINITE_VAL_LOSS),
    "gradient alone": ("train", "root", 0.0, Status.NONFINITE_TRAIN_STATE),
    "hypergradient alone": ("val", "root", 0.0, Status.NONFINITE_HYPERGRAD),
    "second derivative alone": ("train", "bend", 0.0, Status.NONFINITE_HYPERGRAD),
    "learning rate of 1e6": ("train", "root", 1.0, Status.OK),  # told of by nothing in the data
}


def trained(name):
    """`(states, lam before)` of every update, with the leading axes (fault, update)."""
    opt = method(name, **{"inner_optimizer": sgd, **METHODS[name][1]})
    estimator = opt.method()
    problem = BilevelProblem(from_optax(train_loss, opt.inner_optimizer), val_loss, train_loss)
    leading = len(FAULTS), UPDATES, estimator.unroll_steps
    rng = np.random.default_rng(0)

    def side():
        x = rng.standard_normal((*leading, 3, 2)).astype(np.float32)
        return {"x": x, **{flag: np.ones(leading, np.float32) for flag in ("root", "bend")}}

    windows = Window(side(), side())
    for row, (where, entry, value, _) in enumerate(FAULTS.values()):
        getattr(windows, where)[entry][row, BAD, -1, ...] = value  # the window's last step
    params, lam = start(name=name)
    state = init_state(
        problem, estimator, None, params, lam, jax.tree.map(lambda x: x[0, 0], windows)
    )
    rates = jnp.where(np.array(list(FAULTS)) == "learning rate of 1e6", np.log(1e6), -2.0)
    step = partial(bilevel_step(estimator), problem)

    @jax.jit
    @jax.vmap
    def train(windows, rate):
        def update(state, window):
            after = step(state, window, 0.1)
            return after, (after, state.hyperparams)

        first = state.update(hyperparams={**lam, "rate": jnp.full_like(lam["rate"], rate)})
        return jax.lax.scan(update, first, windows)[1]

    after, before = train(windows, rates)
    return jax.tree.map(np.asarray, (after.update(memory=()), before))  # no PRNG keys


# Those that take no derivative of the validation loss, and none of second order.
BY_VALUES = ("es", "pes")
FIRST_ORDER = (*BY_VALUES, "fo", "t1t2", "t1t2_averaged", "f2sa")


def expected(name, fault):
    """The status that this fault ends with."""
    if name in BY_VALUES and fault == "hypergradient alone":
        return Status.OK
    if name in FIRST_ORDER and fault == "second derivative alone":
        return Status.OK
    if name == "reversible" and fault in ("train batch", "gradient alone"):
        return Status.OUT_OF_RANGE
    if name.startswith("implicit") and fault == "second derivative alone":
        return Status.LINEAR_SOLVE_FAILED
    return FAULTS[fault][-1]


@pytest.mark.parametrize("name", METHODS)
def test_36_37_38_what_is_not_finite_never_reaches_a_hyperparameter(name):
    """For every method, at a chosen step, under jit, scan and vmap: the status says which, the
    metadata when, and the updates before and after are taken."""
    states, before = trained(name)
    metadata, after = states.metadata, states.hyperparams
    for row, fault in enumerate(FAULTS):
        at = partial(jax.tree.map, lambda x: x[row])  # noqa: B023
        for x in jax.tree.leaves(at((states.params, states.inner_opt_state, after))):
            assert np.isfinite(x).all(), fault
        rejected = [Status(code).rejects for code in metadata["status"][row]]
        for update in np.flatnonzero(rejected):
            for old, new in zip(*map(jax.tree.leaves, at((before, after))), strict=True):
                np.testing.assert_array_equal(new[update], old[update])
        assert metadata["n_rejected"][row, -1] == sum(rejected)
        if fault == "learning rate of 1e6":
            assert any(rejected), metadata["hypergrad_norm"][row]
            continue
        code = expected(name, fault)
        assert rejected == [False, code.rejects, False], (fault, metadata["status"][row])
        assert not code.rejects or metadata["status"][row, BAD] == code, fault
        assert metadata["first_bad_step"][row, -1] == (BAD if code.rejects else -1)
        assert np.isfinite(metadata["train_loss"][row, BAD]) or fault == "train batch"


def test_37_learned_rates_stay_in_their_interval():
    """An inner loop that diverges from its first step on; the norms tell of it."""
    loss = lambda w, lam, batch: jnp.sum((w - batch) ** 2)  # noqa: E731
    problem = BilevelProblem(from_optax(loss, lambda lam: optax.sgd(lam["rate"])), loss, loss)
    data = InOrder(np.ones((40, 2), np.float32))
    start = {"rate": np.float32(1e6)}
    space = {"rate": spaces.interval(1e-4, 2e6)}
    task = Task(problem, np.zeros(2, np.float32), start, data, data, space=space)
    norms = []
    with pytest.warns(GradhpoWarning, match="updates of this run were rejected"):
        state = tune(
            task,
            one_step(),
            optax.adam(0.1),
            episodes=4,
            T=10,
            callback=lambda _, state: norms.append(float(state.metadata["hypergrad_norm"])),
        )
    assert 1e-4 <= float(task.values(state.hyperparams)["rate"]) <= 2e6
    assert not np.isfinite(norms).all() and np.isfinite(state.params).all()


# -- 40: zero gradients through the optimizers of Optax -------------------------------------------

NEEDS = {  # what has no derivative at a zero gradient, and what mends it
    **dict.fromkeys(("adam", "adamw", "amsgrad", "lamb", "optimistic_adam"), {"eps_root": 1e-8}),
    **dict.fromkeys(("nadam", "nadamw", "optimistic_adam_v2"), {"eps_root": 1e-8}),
    "adafactor": {"eps": 1e-8},
    "radam": None,  # nothing
}
OTHERS = ("lbfgs", "polyak_sgd", "noisy_sgd")  # they take the value of the loss, or a key


def aliases():
    """Every optimizer of Optax that a learning rate is enough for."""
    found = {}
    for name in dir(optax):
        alias = getattr(optax, name)
        if name.startswith(("_", "scale_by")) or not inspect.isfunction(alias):
            continue
        arguments = inspect.signature(alias).parameters
        needed = {x.name for x in arguments.values() if x.default is x.empty}
        if "learning_rate" in arguments and needed <= {"learning_rate"} and name not in OTHERS:
            found[name] = alias
    return found


def dead_relu(w, lam, batch):
    """The second unit is never active, so its weights never get a gradient."""
    hidden = jax.nn.relu(batch @ w["in"])
    return jnp.mean((hidden @ w["out"] - 1.0) ** 2) * jnp.exp(lam)


def finite(optimizers):
    """Whether the hypergradient of each is, at the second step; one program."""
    inner = {"in": jnp.array([[1.0, -1.0], [0.5, -2.0]]), "out": jnp.array([1.0, 1.0])}
    batch, lam = jnp.array([[1.0, 0.5], [0.3, 1.0]]), jnp.array(0.3)

    @jax.jit
    def second():
        found = {}
        for name, optimizer in optimizers.items():
            dynamics = from_optax(dead_relu, optimizer)
            state = dynamics.step(dynamics.init(inner, lam), lam, batch)
            after, pullback = linearize(dynamics, state, lam, batch)
            alpha = zero_cotangent(after)._replace(params=after.params)
            found[name] = jnp.isfinite(pullback(alpha)[1]) & tree_is_finite(after)
        return found

    return {name for name, good in second().items() if good}


def test_40_zero_gradients_are_harmless_or_the_remedy_is_named():
    """Every alias of Optax: a finite hypergradient, or a message with what makes it finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # aliases that Optax renames
        known = aliases()
        bad = known.keys() - finite({name: alias(0.1) for name, alias in known.items()})
        mended = {n: known[n](0.1, **NEEDS[n]) for n in bad if NEEDS[n] is not None}
        assert finite(mended) == mended.keys()
    assert {"sgd", "adam", "rmsprop", "adagrad", "radam", "yogi", "sm3"} <= known.keys()
    assert bad <= NEEDS.keys() and {"adam", "radam", "adafactor"} <= bad
    message = status_message(Status.NONFINITE_HYPERGRAD)
    for word in ("eps_root=1e-8", "Adafactor eps=1e-8", "RAdam has none"):
        assert word in message


# -- 41, 46: too large, too small, exactly zero ---------------------------------------------------


def grown(outer, horizon):
    """An unstable map, w <- 2 w + lam, unrolled: the hypergradient grows like 4^T."""
    dynamics = from_update(lambda w, lam, batch: 2 * w + lam)
    problem = BilevelProblem(dynamics, lambda w, lam, batch: w**2)
    state = init_state(problem, reverse(horizon), outer, jnp.ones(()), jnp.zeros(()))
    nothing = jnp.zeros(horizon)
    return bilevel_step(reverse(horizon), outer)(problem, state, Window(nothing, nothing))


def test_41_an_exploding_hypergradient_is_logged_and_can_be_clipped():
    plain = grown(optax.sgd(1.0), 20)
    norm = float(plain.metadata["hypergrad_norm"])
    assert norm > 1e12 and float(plain.hyperparams) == pytest.approx(-norm)
    clipped = grown(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)), 20)
    assert float(clipped.hyperparams) == pytest.approx(-0.5)
    # A hypergradient whose square is no float32 number: its norm is infinite, each number is not.
    clipped = grown(optax.chain(optax.clip(0.5), optax.sgd(1.0)), 60)
    assert np.isinf(clipped.metadata["hypergrad_norm"]) and float(clipped.hyperparams) == -0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_41_46_a_hypergradient_of_zero_is_told_apart_from_a_hyperparameter_that_is_ignored(dtype):
    """A loss that is flat where the weights are, or derivatives that underflow, show as a norm of
    exactly zero; what is ignored by construction is warned of at the first call, by name."""

    def vanishing(w, lam, batch):
        return (w - 1) ** 2 * 1e-30 + 0 * batch

    def flat(w, lam, batch):
        return jnp.maximum(1.0 - 10 * w, 0.0) + 0 * batch  # a hinge that is satisfied

    def ignored(w, lam, batch):
        return 0 * batch + 1.0

    data, half = InOrder(np.ones(4, dtype)), jnp.full((), 0.5, dtype)
    for loss in (vanishing, flat, ignored):
        dynamics = from_update(lambda w, lam, batch: w - lam * batch * 1e-10)
        task = Task(BilevelProblem(dynamics, loss), half, half, data, data)
        said = nullcontext()
        if loss is ignored:
            said = pytest.warns(GradhpoWarning, match="no gradient path to the weights")
        with said:
            state = tune(task, one_step(), optax.sgd(0.1), episodes=1, T=4)
        assert float(state.metadata["hypergrad_norm"]) == 0.0
        assert state.status_counts == {Status.OK: 4}


# -- 42 to 45: settings at their limits, counters -------------------------------------------------


@pytest.mark.parametrize("make", [greedy, hyperdistill, discounted_sum, one_step])
@pytest.mark.parametrize("gamma", [-0.1, 1.0 + 1e-6, float("nan")])
def test_42_gamma_outside_of_its_interval(make, gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        make(gamma)


@pytest.mark.parametrize("make", [lambda g: greedy(g, 4), lambda g: discounted_sum(g, 4)])
def test_42_both_ends_of_gamma_are_limits(make):
    """No division by 1 - gamma: at 1 the plain sum, at 0 the last term."""

    def at(gamma):
        dynamics = from_update(lambda w, lam, batch: w - 0.1 * (w - lam * batch))
        problem = BilevelProblem(dynamics, lambda w, lam, batch: (w - 2) ** 2)
        data = jnp.array([1.0, 0.5, 2.0, 1.5])
        inner, estimator = InnerState(jnp.ones(()), ()), make(gamma)
        window, lam = Window(data, data), jnp.array(0.5)
        memory = estimator.init(inner, lam, window)
        return float(estimator.estimate(problem, memory, inner, lam, window).hypergrad)

    assert at(1.0) == pytest.approx(at(1 - 1e-6), rel=1e-5)
    assert at(0.0) == pytest.approx(at(1e-6), rel=1e-5)
    assert at(1.0) != pytest.approx(at(0.0), rel=0.1)


@pytest.mark.parametrize("T", [0, -3, 2.5, "4", True])
def test_43_T_is_a_number_of_steps(T):
    with pytest.raises((TypeError, ValueError), match="T must be"):
        method("one_step", inner_optimizer=sgd, T=T)


def test_43_T_beyond_the_data():
    data = InOrder({"x": np.zeros((6, 3, 2), np.float32)})
    opt = method("one_step", inner_optimizer=sgd, T=4)
    losses = {"train_loss_fn": smooth, "val_loss_fn": smooth}
    sources = {"get_train_batch": data, "get_val_batch": data}
    with pytest.raises(ValueError, match="6"):
        opt.run(opt.init(*start()), 2, **sources, **losses, lr_hyper=0.1)


def test_44_a_zero_direction_gives_zero_and_no_nan():
    """The displacement of finite differences is scaled by the gradient of the validation loss."""
    dynamics = from_optax(lambda w, lam, batch: lam * w**2, optax.sgd(0.1))
    problem = BilevelProblem(dynamics, lambda w, lam, batch: 0.0 * w + 0.0 * lam)
    state = init_state(problem, finite_difference(), None, jnp.ones(()), jnp.ones(()))
    after = bilevel_step(finite_difference())(problem, state, Window(jnp.zeros(1), jnp.zeros(1)), 1)
    assert after.metadata["status"] == Status.OK and float(after.hyperparams) == 1.0


def test_45_counters_stay_at_their_largest_number():
    most = np.iinfo(np.int32).max
    problem = BilevelProblem(from_update(lambda w, lam, b: w - lam * b), lambda w, lam, b: w**2)
    state = init_state(problem, one_step(), None, jnp.ones(()), jnp.ones(()))
    near = jnp.asarray(most - 1, jnp.int32)
    state = state.update(
        step=near,
        episode=near,
        drawn=near,
        counts=jnp.full_like(state.counts, most - 1),
        metadata={"n_rejected": near},
    )
    bad = jnp.full(3, jnp.nan)
    after = run_episode(one_step(), None, problem, state, Window(bad, bad), 0.1)
    counted = (after.step, after.episode, after.drawn, after.metadata["n_rejected"])
    assert [int(x) for x in counted] == [most, most, most, most]
    assert int(after.counts[Status.NONFINITE_TRAIN_STATE]) == most
    assert int(after.counts[Status.OK]) == most - 1
    task = Task(problem, 1.0, 1.0, lambda: np.ones(()), lambda: np.ones(()))
    with pytest.raises(ValueError, match="state.drawn counts no more than 2147483647"):
        tune(task, one_step(), episodes=1, T=2, lr_hyper=0.1, state=state)
