"""Starts that depend on hyperparameters: every method that carries alpha to s_0 agrees with the
derivative of the training written out; the others take s_0 for a constant; what cannot be meant is
refused."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from start_cases import (
    OPTIMIZERS,
    READ,
    STARTS,
    T,
    begin_of,
    hyperparams,
    network,
    problem_of,
    train_loss,
    val_loss,
    window,
    written_out,
)

from gradhpo import (
    BilevelProblem,
    DrMADOptimizer,
    Dynamics,
    ForwardOptimizer,
    GradhpoWarning,
    InnerState,
    InOrder,
    ReverseOptimizer,
    ReversibleOptimizer,
    Start,
    Window,
    bilevel_step,
    drmad,
    es,
    first_order,
    forward,
    from_optax,
    from_update,
    greedy,
    hyperdistill,
    implicit,
    init_state,
    one_step,
    pes,
    reverse,
    reversible,
    run_episode,
    run_episodes,
)
from gradhpo.core.episode import start_episode
from gradhpo.testing import assert_trees_close

EXACT = {  # estimator, inner optimizer, steps of the episode
    "reverse": (reverse(T), "optax", T),
    "segments": (reverse(T, memory="segments"), "optax", T),
    "nested segments": (reverse(8, memory="segments", budget=1200), "optax", 8),
    "retraceable": (reverse(T), "retraceable", T),
    "reversible": (reversible(T), "reversible", T),
    "forward": (forward(T), "optax", T),
    "forward, passes": (forward(T, budget=900), "optax", T),
    "rtho": (forward(2, online=True), "optax", T),
    "drmad": (drmad(1), "optax", 1),
}
CASES = [(name, start) for name in EXACT for start in STARTS if name in ("reverse", "forward")]
CASES += [(name, "scale") for name in EXACT] + [("reversible", s) for s in STARTS]
CASES += [("drmad", "network"), ("rtho", "velocity"), ("retraceable", "velocity")]
KEY = 5


@functools.cache
def training(start, optimizer, steps):
    """The training written out as a program, which several tests share:
    `(lam, w, draw) -> ((loss, w_T), derivative)`."""

    def loss(lam, params, draw):
        return written_out(start, optimizer, params, draw, window(steps))(lam)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def derivative(start, optimizer, steps, params=None, draw=None):
    """`((loss, w_T), hypergradient)` of the training written out."""
    params = network(0) if params is None else params
    draw = jax.random.key(KEY) if draw is None else draw
    return training(start, optimizer, steps)(hyperparams(start), params, draw)


def episode(estimator, problem, state, *data, **draw):
    """`run_episode` as one program."""
    return jax.jit(partial(run_episode, estimator, READ, problem))(state, *data, **draw)


@pytest.mark.parametrize("name, start", sorted(set(CASES)))
def test_functions_agree_with_the_training_written_out(name, start, x64):
    estimator, optimizer, steps = EXACT[name]
    problem = problem_of(start, optimizer)
    state = init_state(problem, estimator, READ, network(0), hyperparams(start))
    draw = jax.random.key(KEY)
    got = episode(estimator, problem, state, window(steps), draw=draw)
    (loss, end), want = derivative(start, optimizer, steps)
    assert_trees_close(got.outer_opt_state, want, 1e-9)
    assert_trees_close(got.params, end, 1e-9)
    np.testing.assert_allclose(got.get_metric("val_loss"), loss, rtol=1e-9)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_one_step_of_the_loop_takes_the_origin(loop, x64):
    """`bilevel_step` in a loop of the user's own: the first window of an episode has the origin."""
    estimator = reverse(2, loop=loop)
    problem = problem_of("network", "optax")
    state = init_state(problem, estimator, READ, network(0), hyperparams("network"))
    state, origin, own = start_episode(estimator, problem, state)
    assert own is None and origin is not None
    first, second = (jax.tree.map(lambda x: x[i : i + 2], window()) for i in (0, 2))  # noqa: B023
    step = jax.jit(partial(bilevel_step(estimator, READ), problem))
    state = step(state, first, None, origin)
    assert_trees_close(state.outer_opt_state, derivative("network", "optax", 2)[1], 1e-9)
    state = step(state, second)  # its s_0 is a constant
    np.testing.assert_allclose(
        state.outer_opt_state["start"]["w1"],
        0.1 * np.cos(hyperparams("network")["start"]["w1"]),
        rtol=1e-9,
    )


def test_drmad_on_a_straight_line(x64):
    """Several steps of a linear loss, uniform in speed: the other exact limit."""
    c = jnp.asarray([1.0, -2.0])

    def linear(w, lam, batch):
        return jnp.sum(w * c) * jnp.exp(lam["decay"])

    def judge(w, lam, batch):
        return jnp.sum((w - 1) ** 2)

    def begin(params, lam, draw):
        return Start(jnp.sin(lam["start"]) * params)

    problem = BilevelProblem(from_optax(linear, optax.sgd(0.1)), judge, begin=begin)
    w = jnp.asarray([0.5, 2.0])
    lam = {"start": jnp.asarray(0.7), "decay": jnp.asarray(0.2)}
    data = Window(jnp.zeros(T), jnp.zeros(T))
    state = episode(drmad(T), problem, init_state(problem, drmad(T), READ, w, lam), data)

    def written(lam):
        return judge(jnp.sin(lam["start"]) * w - T * 0.1 * jnp.exp(lam["decay"]) * c, lam, None)

    assert_trees_close(state.outer_opt_state, jax.grad(written)(lam), 1e-9)


@pytest.mark.parametrize("start", ["scale", "offset"])
@pytest.mark.parametrize("name", ["reverse", "rtho"])
def test_every_episode_begins_anew(name, start, x64):
    """Draw by draw, and from what the last episode has left behind, which is a constant."""
    estimator, optimizer, steps = EXACT[name]
    problem = problem_of(start, optimizer)
    draws = jax.random.split(jax.random.key(1), 3)
    windows = jax.tree.map(lambda x: np.stack([x] * 3), window(steps))
    state = init_state(problem, estimator, READ, network(0), hyperparams(start))
    observe = lambda state: state.outer_opt_state  # noqa: E731
    run = partial(run_episodes, estimator, READ, problem, observe=observe)
    _, got = jax.jit(run)(state, windows, draws=draws)
    params = network(0)
    for m, draw in enumerate(draws):
        (_, params), want = derivative(start, optimizer, steps, params, draw)
        assert_trees_close(jax.tree.map(lambda x: x[m], got), want, 1e-9)  # noqa: B023


def test_slots_that_hold_hyperparameters(x64):
    """`optax.inject_hyperparams` keeps them in the slots, which `init` makes of lam."""
    make = lambda lam: optax.inject_hyperparams(optax.sgd)(  # noqa: E731
        learning_rate=jnp.exp(lam["rate"]), momentum=0.5
    )
    problem = BilevelProblem(from_optax(train_loss, make), val_loss)
    lam = hyperparams("scale")
    loss = written_out("velocity", "optax", network(0), None, window())
    zero = jax.tree.map(jnp.zeros_like, network(0))
    want = jax.grad(lambda rate: loss(lam | {"rate": rate, "start": zero})[0])(lam["rate"])
    for estimator in (reverse(T), forward(T), forward(2, online=True)):
        state = init_state(problem, estimator, READ, network(0), lam)
        state = episode(estimator, problem, state, window())
        np.testing.assert_allclose(state.outer_opt_state["rate"], want, rtol=1e-9)


# -- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["scan", "unroll", "host"])
@pytest.mark.parametrize(
    "make, name, start",
    [
        (ReverseOptimizer, "reverse", "network"),
        (ReverseOptimizer, "reverse", "scale"),
        (ReversibleOptimizer, "reversible", "network"),
        (ForwardOptimizer, "forward", "network"),
        (DrMADOptimizer, "drmad", "network"),
    ],
)
def test_classes_agree_with_the_training_written_out(make, name, start, loop, x64):
    _, optimizer, steps = EXACT[name]
    opt = make(
        inner_optimizer=OPTIMIZERS[optimizer][0],
        begin=begin_of(start),
        outer_optimizer=READ,
        T=steps,
        loop=loop,
    )
    data = window(steps)
    state = opt.run(
        opt.init(network(0), hyperparams(start)),
        1,
        get_train_batch=InOrder(data.train),
        get_val_batch=InOrder(data.val),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )
    draw = jax.random.fold_in(jax.random.key(0), 0)  # of the first episode
    assert_trees_close(
        state.outer_opt_state, derivative(start, optimizer, steps, None, draw)[1], 1e-9
    )


def test_online_class_over_several_windows(x64):
    opt = ForwardOptimizer(
        inner_optimizer=OPTIMIZERS["optax"][0],
        begin=begin_of("network"),
        outer_optimizer=READ,
        online=True,
        unroll_steps=2,
        T=T,
    )
    data = window()
    state = opt.run(
        opt.init(network(0), hyperparams("network")),
        1,
        get_train_batch=InOrder(data.train),
        get_val_batch=InOrder(data.val),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )
    assert_trees_close(state.outer_opt_state, derivative("network", "optax", T)[1], 1e-9)


# -- an init of one's own ------------------------------------------------------------------------


def scaled_init(weight=0.1):
    """Training from lam * params; after three steps w = 1 + (lam p - 1) 0.9^3."""
    return Dynamics(
        init=lambda p, lam: InnerState(lam * p, ()),
        step=lambda s, lam, b: s._replace(params=s.params - weight * (s.params - b)),
    )


@pytest.mark.parametrize("estimator", [reverse(3), forward(3)], ids=["reverse", "forward"])
def test_three_steps_from_an_init_that_depends_on_lam(estimator):
    problem = BilevelProblem(scaled_init(), lambda w, lam, v: (w - v) ** 2)
    state = init_state(problem, estimator, READ, jnp.array(1.0), jnp.array(2.0))
    state = episode(estimator, problem, state, Window(jnp.ones(3), jnp.zeros(3)))
    want = 2 * (1 + 0.9**3) * 0.9**3
    assert round(want, 2) == 2.52
    np.testing.assert_allclose(state.outer_opt_state, want, rtol=1e-6)


# -- evolution strategies: the same perturbations of a problem whose first step is the start -------


def pulled(w, lam, batch):
    return w - 0.1 * jnp.exp(lam["rate"]) * (w - batch)


def moved_start(params, lam):
    return params * jnp.sin(lam["start"]) + lam["start"]


@pytest.mark.parametrize("estimator, windows", [(es(2, seed=3), 1), (pes(2, seed=3), 2)])
def test_evolution_strategies_perturb_the_start(estimator, windows, x64):
    def judge(w, lam, batch):
        return jnp.sum((w - batch) ** 2)

    def first_step_starts(params, lam, batch):
        w = jnp.where(params["t"] == 0, moved_start(params["w"], lam), params["w"])
        return {"w": pulled(w, lam, batch), "t": params["t"] + 1}

    w, lam = jnp.asarray([1.0, -0.5]), {"start": jnp.asarray(0.4), "rate": jnp.asarray(0.1)}
    data = jnp.sin(jnp.arange(2.0 * windows)[:, None] + jnp.arange(2.0))
    data = Window(data, data)
    ours = BilevelProblem(
        from_update(pulled), judge, begin=lambda p, lam, draw: Start(moved_start(p, lam))
    )
    inside = BilevelProblem(from_update(first_step_starts), lambda p, lam, b: judge(p["w"], lam, b))
    found = [
        episode(
            estimator, problem, init_state(problem, estimator, READ, params, lam), data
        ).outer_opt_state
        for problem, params in ((ours, w), (inside, {"w": w, "t": 0}))
    ]
    assert_trees_close(found[0], found[1], 1e-9)
    assert abs(float(found[0]["start"])) > 0.01


def test_evolution_strategies_see_a_start_without_a_derivative():
    """A width that is rounded: derivatives are zero, values are not."""
    begin = lambda p, lam, draw: Start(p + jnp.round(lam))  # noqa: E731
    problem = BilevelProblem(from_update(lambda w, lam, b: w), lambda w, lam, b: w, begin=begin)
    data = Window(jnp.zeros(1), jnp.zeros(1))
    for estimator, moves in ((es(1, sigma=1.0), True), (reverse(1), False)):
        state = init_state(problem, estimator, READ, jnp.zeros(()), jnp.array(0.2))
        state = episode(estimator, problem, state, data)
        assert bool(state.outer_opt_state != 0) is moves


# -- methods for which s_0 is a constant ---------------------------------------------------------

BLIND = {
    "first_order": first_order(),
    "one_step": one_step(),
    "greedy": greedy(0.9, 2),
    "hyperdistill": hyperdistill(0.9, theta=1.0),
    "implicit": implicit(),
    "reverse, truncated": reverse(T, truncate=2),
}


@pytest.mark.parametrize("name", BLIND)
def test_methods_without_alpha_take_the_start_for_a_constant(name, x64):
    """The hypergradient by where training begins is its direct part."""
    estimator, problem = BLIND[name], problem_of("layer", "optax")
    if name == "implicit":  # refuses a rate, which moves no minimum
        problem = problem._replace(dynamics=from_optax(train_loss, optax.sgd(0.1)))
    lam = hyperparams("layer")
    state = init_state(problem, estimator, READ, network(0), lam, window(estimator.unroll_steps))
    assert start_episode(estimator, problem, state).origin is None
    state = episode(estimator, problem, state, window())
    got = state.outer_opt_state["start"]
    np.testing.assert_allclose(got, 0.1 * np.cos(lam["start"]), rtol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


def begun(begin, estimator=reverse(2), params=None, lam=None, data="given"):  # noqa: B008
    params = {"w": jnp.ones(3)} if params is None else params
    lam = {"a": jnp.asarray(0.5), "b": jnp.ones(3)} if lam is None else lam
    step = from_update(lambda w, lam, batch: {"w": w["w"] - lam["a"] * batch})
    problem = BilevelProblem(step, lambda w, lam, batch: jnp.sum(w["w"]), begin=begin)
    window = Window(jnp.ones(2), jnp.ones(2)) if data == "given" else data
    state = init_state(problem, estimator, READ, params, lam)
    return run_episode(estimator, READ, problem, state, window)


OWN = Window(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    "begin, error, message",
    [
        (lambda p, lam, draw: p, TypeError, r"must return a gradhpo.Start.*returned dict"),
        (lambda p, lam, draw: (p, None), TypeError, r"must return a gradhpo.Start.*returned tuple"),
        (lambda p, lam, draw: None, TypeError, r"must return a gradhpo.Start.*NoneType"),
        (lambda p, lam: Start(p), TypeError, "takes 2 positional arguments"),
        (lambda p, lam, draw: Start({"w": lam["a"]}), ValueError, r"\['w'\].*\[3\] to .*\[\]"),
        (lambda p, lam, draw: Start({"v": p["w"]}), ValueError, "begin"),
        (
            lambda p, lam, draw: Start(p, model_state=jnp.zeros(2)),
            ValueError,
            r"begin.*model_state",
        ),
        (lambda p, lam, draw: Start(p, OWN), ValueError, "both do"),
    ],
)
def test_a_start_that_cannot_be_meant(begin, error, message):
    with pytest.raises(error, match=message):
        begun(begin)


def test_weights_of_another_dtype(x64):
    """A hyperparameter wider than the parameters."""
    begin = lambda p, lam, draw: Start({"w": lam["b"]})  # noqa: E731
    with pytest.raises(ValueError, match=r"\['w'\] went from float32\[3\] to float64\[3\]"):
        begun(begin, params={"w": jnp.ones(3, jnp.float32)})


def test_batches_from_nowhere():
    with pytest.raises(ValueError, match="neither does"):
        begun(lambda p, lam, draw: Start({"w": lam["b"]}), data=None)


@pytest.mark.parametrize("estimator", [reverse(2), one_step(), es(2)], ids=["reverse", "one", "es"])
def test_a_window_that_depends_on_lam(estimator):
    """Also in methods to which the start is a constant: its derivative would be lost."""

    def begin(params, lam, draw):
        return Start(params, Window(lam["a"] * jnp.ones(2), jnp.ones(2)))

    with pytest.raises(ValueError, match=r"window that begin returns depends on .* leaf \['a'\]"):
        begun(begin, estimator, data=None)


def test_a_start_with_a_rule_of_its_own(x64):
    """A `custom_vjp` in begin: reverse mode follows the rule, and its window is no suspect."""

    @jax.custom_vjp
    def through(x):
        return jnp.round(x)

    through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    begin = lambda p, lam, draw: Start({"w": through(lam["b"])}, OWN)  # noqa: E731
    state = begun(begin, data=None)
    np.testing.assert_allclose(state.outer_opt_state["b"], np.ones(3))
    with pytest.raises(TypeError, match="custom_vjp"):
        begun(begin, forward(2), data=None)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_a_start_that_is_not_finite_costs_its_episode_alone(loop):
    """The next one begins at the last finite weights, not at infinity."""
    draws = iter([0.0, np.inf, 0.0, 0.0])

    def begin(params, lam, draw):
        return Start(params + draw)

    tuner = ReverseOptimizer(
        inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), begin=begin, T=2, loop=loop
    )

    def loss(w, lam, batch):
        return jnp.sum((w - lam - batch) ** 2)

    ones = InOrder(np.ones((8, 2), np.float32))
    with pytest.warns(GradhpoWarning, match="NONFINITE_TRAIN_STATE 1"):
        state = tuner.run(
            tuner.init(np.zeros(2, np.float32), np.zeros(2, np.float32)),
            4,
            get_train_batch=ones,
            get_val_batch=ones,
            get_task=lambda: np.float32(next(draws)),
            train_loss_fn=loss,
            val_loss_fn=loss,
        )
    assert np.isfinite(state.params).all()
    assert int(state.metadata["n_rejected"]) == 1 and int(state.metadata["first_bad_step"]) == 1
