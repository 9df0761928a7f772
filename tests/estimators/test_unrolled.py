"""Reverse mode in all its memories, forward mode in all its forms, DrMAD."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_formulas import Dense, at, every_step, flat_state, started, whole_window
from jax.flatten_util import ravel_pytree

from gradhpo import (
    BilevelProblem,
    Status,
    Window,
    bilevel_step,
    drmad,
    first_order,
    forward,
    forward_sharing,
    from_optax,
    from_update,
    init_state,
    one_step,
    reverse,
    unrolled_gradients,
)
from gradhpo.core.dynamics import InnerState
from gradhpo.estimators._segments import levels_for
from gradhpo.testing import assert_trees_close, relative_error, unrolled_loss
from gradhpo.testing.problems import (
    ZOO,
    contraction,
    integer_leaves,
    mlp_momentum,
    nested,
    outer_lam,
    ridge,
    straight_line,
)
from gradhpo.transforms import adam, momentum_sgd, scale_by_tree
from gradhpo.utils.gradients import tree_bytes

pytestmark = pytest.mark.usefixtures("x64")
T = 7


def curved(make_optimizer, steps=T):
    """Six weights in a curved loss; six learning rates, six penalties and a decay."""
    noise = np.random.default_rng(0)
    half = noise.standard_normal((6, 6))
    hessian = half @ half.T / 6

    def train_loss(w, lam, batch):
        penalty = jnp.sum(jnp.exp(lam["penalty"]) * w**2)
        return w @ hessian @ w / 2 + penalty + jnp.sum(jnp.sin(w * batch))

    def outer_loss(w, lam, batch):
        return jnp.sum((w - batch) ** 2)

    lam = {
        "rate": jnp.asarray(noise.standard_normal(6) / 3 - 2.5),
        "penalty": jnp.asarray(noise.standard_normal(6) - 2),
        "decay": jnp.asarray(0.8),
    }
    problem = BilevelProblem(from_optax(train_loss, make_optimizer), outer_loss)
    inner = problem.dynamics.init(jnp.asarray(noise.standard_normal(6)), lam)
    window = Window(*(jnp.asarray(noise.standard_normal((steps, 6))) for _ in range(2)))
    return problem, inner, lam, window


def plain_momentum(lam):
    return optax.chain(optax.trace(lam["decay"]), scale_by_tree(-jnp.exp(lam["rate"])))


def plain_adam(lam):
    moments = optax.scale_by_adam(lam["decay"], 0.99, 1e-8, 1e-4)
    return optax.chain(moments, scale_by_tree(-jnp.exp(lam["rate"])))


RETRACEABLE = {
    "momentum": (lambda lam: momentum_sgd(jnp.exp(lam["rate"]), lam["decay"]), plain_momentum),
    "adam": (
        lambda lam: adam(jnp.exp(lam["rate"]), lam["decay"], 0.99, 1e-8, 1e-4),
        plain_adam,
    ),
}
MEMORIES = [
    {},
    {"memory": "segments"},
    {"memory": "segments", "budget": "tight"},
    {"memory": "segments", "loop": "unroll"},
    {"memory": "segments", "loop": "host"},
]


def with_budget(settings, inner):
    if settings.get("budget") == "tight":  # too little for one level
        return {**settings, "budget": 7 * tree_bytes(inner)}
    return settings


# -- reverse mode ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", MEMORIES, ids=str)
@pytest.mark.parametrize("name", RETRACEABLE)
def test_memories_have_one_answer(name, settings):
    """Against jax.grad of the unrolled loss, also for the initial state."""
    problem, inner, lam, window = curved(RETRACEABLE[name][0], steps=13)
    want, last = by_jax_grad(RETRACEABLE[name][1], 13)
    got = unrolled_gradients(problem, inner, lam, window, **with_budget(settings, inner))
    assert_trees_close(optax.tree.add(got.direct, got.indirect), want[0], 1e-12)
    assert_trees_close(got.initial.params, want[1], 1e-12)
    assert_trees_close(flat_state(got.inner)[:6], last, 1e-13)


@functools.cache
def by_jax_grad(make_optimizer, steps):
    """Derivatives of the unrolled loss in lam and w_0, and the last weights."""
    problem, inner, lam, window = curved(make_optimizer, steps)

    @jax.jit
    def loss(lam, w):
        return unrolled_loss(problem, problem.dynamics.init(w, lam), lam, window)

    wanted = jax.grad(loss, argnums=(0, 1))(lam, inner.params)
    for t in range(steps):
        inner = problem.dynamics.step(inner, lam, at(window.train, t))
    return wanted, inner.params


@pytest.mark.parametrize("name", ["nested", "integer_leaves", "mlp_adam", "contraction"])
def test_segments_are_the_trajectory_on_the_zoo(name):
    case = started(ZOO[name], 5)
    want = whole_window(reverse(5), *case)
    got = whole_window(reverse(5, memory="segments"), *case)
    assert_trees_close(got.hypergrad, want.hypergrad, 1e-13)
    assert_trees_close(flat_state(got.inner), flat_state(want.inner), 1e-14)


@pytest.mark.optimised
def test_weights_are_rebuilt_not_stored():
    """The compiled program of rebuilt momentum holds about half the bytes."""
    steps = 50

    def temp(make_optimizer, **settings):
        problem, inner, lam, window = curved(make_optimizer, steps)
        wide = jnp.zeros(60_000)

        def train_loss(w, lam, batch):
            return jnp.sum(jnp.sin(w)) * jnp.exp(lam["decay"])

        dynamics = from_optax(train_loss, make_optimizer)
        problem = BilevelProblem(dynamics, lambda w, lam, batch: jnp.sum(w**2))
        lam = {"rate": wide, "decay": lam["decay"]}
        estimator = reverse(steps, **settings)

        def program(lam):
            inner = dynamics.init(wide, lam)
            return estimator.estimate(problem, (), inner, lam, window).hypergrad

        return jax.jit(program).lower(lam).compile().memory_analysis().temp_size_in_bytes

    retraceable, plain = RETRACEABLE["momentum"]
    whole = temp(plain)
    assert temp(retraceable) < 0.62 * whole
    assert temp(retraceable, memory="segments") < 0.4 * whole


def test_truncation_limits():
    """K = T is reverse, K = 1 one step, K = 0 the direct term."""
    case = started(outer_lam, T)
    full = whole_window(reverse(T), *case).hypergrad
    for settings in ({}, {"memory": "segments"}):
        got = whole_window(reverse(T, truncate=T, **settings), *case)
        assert_trees_close(got.hypergrad, full, 1e-14)
        got = whole_window(reverse(T, truncate=1, **settings), *case).hypergrad
        assert_trees_close(got, every_step(one_step(), *case)[-1].hypergrad, 1e-14)
        got = whole_window(reverse(T, truncate=0, **settings), *case).hypergrad
        assert_trees_close(got, every_step(first_order(), *case)[-1].hypergrad, 1e-14)
    assert relative_error(whole_window(reverse(T, truncate=2), *case).hypergrad, full) > 1e-3


@pytest.mark.parametrize("problem_at", [contraction, ridge], ids=lambda p: p.__name__)
def test_truncation_error_is_within_its_bound(problem_at):
    """|h_K - h_T| <= |alpha_T| max |B| rho^K / (1 - rho), rho the largest |A_t|."""
    steps = 12
    case = started(problem_at, steps)
    dense = Dense.of(*case)
    exact = dense.reverse()
    rho = max(float(jnp.linalg.norm(a, 2)) for a in dense.A)
    widest = max(float(jnp.linalg.norm(b, 2)) for b in dense.B)
    assert rho < 1
    for kept in (1, 3, 6, 9):
        got = whole_window(reverse(steps, truncate=kept), *case).hypergrad
        error = float(jnp.linalg.norm(ravel_pytree(got)[0] - exact))
        bound = float(jnp.linalg.norm(dense.alpha[-1])) * widest * rho**kept / (1 - rho)
        assert 0 < error <= bound, (kept, error, bound)


@pytest.mark.parametrize("steps", [2, 3, 7, 100, 101, 997])
@pytest.mark.parametrize("kept", [8, 4])
def test_levels_fit_their_budget(steps, kept):
    state = 8
    for budget in (None, steps * kept, *(state * k for k in (200, 60, 40, 30, 20))):
        try:
            levels = levels_for(steps, state, kept, budget)
        except ValueError as error:
            assert "more than the budget" in str(error)
            continue
        alive, outer = 0, steps
        for length in levels:
            assert 1 <= length <= outer
            alive += -(-outer // length) * state
            outer = length
        assert budget is None or alive + outer * kept <= budget
    assert levels_for(steps, state, kept, steps * kept) == ()  # all fits: nothing is run twice


@pytest.mark.parametrize("steps", [2, 13, 400, 997, 1000])
@pytest.mark.parametrize("state, kept", [(8, 8), (8, 4), (12, 1)])
def test_a_smaller_budget_never_stores_more(steps, state, kept):
    plans = []
    for budget in range(steps * kept, 0, -1):
        try:
            levels = levels_for(steps, state, kept, budget)
        except ValueError:
            assert all(bytes_ > budget for bytes_, _ in plans)
            break
        ends = (steps, *levels)
        starts = sum(-(-outer // inner) for outer, inner in itertools.pairwise(ends))
        plans.append((starts * state + ends[-1] * kept, len(levels)))
    assert plans == sorted(plans, key=lambda plan: (-plan[0], plan[1]))
    stored, depths = zip(*plans, strict=True)
    assert list(depths) == sorted(depths) and len(set(stored)) == len(set(depths))


def test_growth_is_the_largest_cotangent():
    case = problem, inner, lam, window = started(outer_lam, T)
    dense = Dense.of(*case)
    alpha, norms = dense.alpha[-1], []
    for a in reversed([None, *dense.A]):
        norms.append(float(jnp.linalg.norm(alpha)))
        alpha = alpha if a is None else alpha @ a
    got = unrolled_gradients(problem, inner, lam, window)
    np.testing.assert_allclose(got.growth, max(norms) / norms[0], rtol=1e-12)


def test_wrong_settings_are_named():
    for settings, message in [
        ({"truncate": 9}, "at most the 7 steps"),
        ({"truncate": -1}, "truncate must be at least 0"),
        ({"memory": "disk"}, "'segments' or 'reversible'"),
        ({"budget": 100}, "give both"),
    ]:
        with pytest.raises(ValueError, match=message):
            reverse(T, **settings)
    with pytest.raises(ValueError, match="more than the budget of 10"):
        whole_window(reverse(T, memory="segments", budget=10), *started(outer_lam, T))


RATES = {"a": jnp.full(3, 0.1), "b": jnp.asarray(0.2)}


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (momentum_sgd(0.1, 0.9), optax.sgd(0.1, momentum=0.9)),
        (
            momentum_sgd(RATES, 0.9),
            optax.chain(optax.trace(0.9), scale_by_tree(optax.tree.scale(-1, RATES))),
        ),
        (adam(0.1, eps_root=0.0), optax.adam(0.1)),
    ],
    ids=["momentum", "momentum_tree", "adam"],
)
def test_retraceable_optimizers_are_optax(ours, theirs):
    """The same updates; the slots tell the last one and the gradient it was made of."""
    w = {"a": jnp.arange(3.0), "b": jnp.ones(())}
    before, z = ours.init(w), theirs.init(w)
    for t in range(3):
        g = jax.tree.map(lambda x: jnp.cos(x + t), w)  # noqa: B023
        u, after = ours.update(g, before, w)
        v, z = theirs.update(g, z, w)
        assert_trees_close(u, v, 1e-13)
        assert_trees_close(ours.last_updates(after), u, 1e-15)
        assert_trees_close(ours.last_gradients(before, after), g, 1e-14)
        w, before = optax.apply_updates(w, u), after


@pytest.mark.parametrize("name", RETRACEABLE)
def test_narrow_weights_stay_narrow(name):
    """bfloat16 weights under float32 settings of the optimizer: near the float32 answer."""

    def both(dtype):
        problem, _, lam, window = curved(RETRACEABLE[name][0], steps=4)
        lam, window = jax.tree.map(lambda x: x.astype(jnp.float32), (lam, window))
        inner = problem.dynamics.init(jnp.linspace(-1, 1, 6, dtype=dtype), lam)
        return unrolled_gradients(problem, inner, lam, window)

    got, want = both(jnp.bfloat16), both(jnp.float32)
    assert got.inner.params.dtype == jnp.bfloat16
    assert relative_error(got.indirect, want.indirect) < 0.05


# -- forward mode ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nested", "integer_leaves", "mlp_momentum", "mlp_adam"])
def test_forward_is_reverse(name):
    """Slots of the optimizer included."""
    case = started(ZOO[name], 4)
    want = whole_window(reverse(4), *case)
    got = whole_window(forward(4), *case)
    assert_trees_close(got.hypergrad, want.hypergrad, 1e-12)
    assert_trees_close(flat_state(got.inner), flat_state(want.inner), 1e-14)


@pytest.mark.parametrize("loop", ["scan", "unroll", "host"])
def test_chunks_of_columns_change_nothing(loop):
    case = problem, inner, lam, window = curved(plain_momentum)
    want = whole_window(forward(T), *case)
    size = tree_bytes(inner)
    estimator = forward(T, budget=5 * size, loop=loop)  # 13 columns in passes of five
    got = estimator.estimate(problem, (), inner, lam, window)
    assert_trees_close(got.hypergrad, want.hypergrad, 1e-13)
    assert_trees_close(flat_state(got.inner), flat_state(want.inner), 1e-13)


def test_rtho_at_rest_is_forward_mode_at_every_step():
    """Forward mode at every step; and with reset columns in between it is not."""
    case = problem, inner, lam, window = started(mlp_momentum, 4)
    online = forward(1, online=True)
    for t, got in enumerate(every_step(online, *case), start=1):
        part = jax.tree.map(lambda x: x[:t], window)  # noqa: B023
        want = whole_window(reverse(t), problem, inner, lam, part).hypergrad
        assert_trees_close(got.hypergrad, want, 1e-12)
    short = every_step(one_step(), *case)[-1].hypergrad
    assert relative_error(short, got.hypergrad) > 1e-3
    memory = online.reset(got.memory, inner, lam)
    assert not any(np.any(z) for z in jax.tree.leaves(memory))


def test_rtho_goes_on_through_a_bad_validation_batch():
    """Z belongs to s_t: it moves on with it, and the next hypergradients miss nothing."""
    found = []
    for bad in (None, 2):
        problem, inner, lam, window = started(outer_lam, 6)
        step = bilevel_step(forward(1, online=True))
        state = init_state(problem, forward(1, online=True), None, inner.params, lam)
        for t in range(6):
            one = jax.tree.map(lambda x: x[t : t + 1], window)  # noqa: B023
            if t == bad:
                one = one._replace(val=jax.tree.map(lambda x: x * jnp.nan, one.val))
            state = step(problem, state, one, 0.0)
            assert state.metadata["status"] == (0 if t != bad else Status.NONFINITE_VAL_LOSS)
        found.append(state.memory.Z)
    assert_trees_close(found[1], found[0], 1e-15)


def test_forward_keeps_the_dtypes_of_the_hyperparameters():
    problem, inner, _, window = started(integer_leaves, 3)
    lam = jax.tree.map(lambda x: x.astype(jnp.bfloat16), integer_leaves(3).hyperparams)
    got = whole_window(forward(3), problem, inner, lam, window)
    assert {x.dtype for x in jax.tree.leaves(got.hypergrad)} == {jnp.dtype(jnp.bfloat16)}
    want = whole_window(reverse(3), problem, inner, lam, window)
    assert relative_error(got.hypergrad, want.hypergrad) < 0.02


def test_a_budget_too_small_is_named():
    _, inner, lam, _ = case = curved(plain_momentum)
    column = tree_bytes(inner)
    with pytest.raises(ValueError, match=f"a state of {column} bytes .* 13 hyperparameters"):
        forward(1, online=True, budget=12 * column).init(inner, lam, None)
    with pytest.raises(ValueError, match="more than the budget of 3"):
        whole_window(forward(T, budget=3), *case)


def schedule(pieces, steps):
    """Learning rate and momentum of their own for every piece of the run."""

    def optimizer(lam):
        def rate(count):
            return jnp.exp(lam["rate"])[count // (steps // pieces)]

        def gain(count):
            return 1 + lam["gain"][count // (steps // pieces)].sum()

        return optax.chain(optax.scale_by_schedule(gain), optax.sgd(rate, momentum=0.8))

    problem, inner, _, window = curved(plain_momentum, steps)
    loss = problem.dynamics.parts.train_loss
    still = {"penalty": jnp.full(6, -2.0)}
    dynamics = from_optax(lambda w, lam, batch: loss(w, still, batch), optimizer)
    noise = np.random.default_rng(1)
    lam = {
        "rate": jnp.asarray(noise.standard_normal(pieces) / 3 - 2),
        "gain": jnp.asarray(noise.standard_normal((pieces, 2)) / 5),
    }
    problem = problem._replace(dynamics=dynamics)
    return problem, dynamics.init(inner.params, lam), lam, window


@pytest.mark.parametrize("pieces", [1, 3, 6])
def test_sharing_sums_over_the_piece(pieces):
    """Reverse mode knows nothing of pieces; `average` divides by their length."""
    case = schedule(pieces, 6)
    want = whole_window(reverse(6), *case).hypergrad
    got = whole_window(forward_sharing(6, pieces, average=False), *case).hypergrad
    assert_trees_close(got, want, 1e-12)
    mean = whole_window(forward_sharing(6, pieces), *case).hypergrad
    assert_trees_close(mean, optax.tree.scale(pieces / 6, want), 1e-12)


def test_sharing_needs_one_entry_per_piece():
    problem, inner, lam, _ = schedule(3, 6)
    del problem
    with pytest.raises(ValueError, match="needs 2 entries"):
        forward_sharing(6, 2).init(inner, lam, None)
    with pytest.raises(ValueError, match="multiple of the 4 pieces"):
        forward_sharing(6, 4)


# -- DrMAD -----------------------------------------------------------------------------------


def test_drmad_is_exact_on_a_straight_line():
    """With the two wrong values of beta as controls."""
    steps = 6
    case = problem, inner, lam, window = started(straight_line, steps)
    exact = whole_window(reverse(steps), *case).hypergrad
    assert_trees_close(whole_window(drmad(steps), *case).hypergrad, exact, 1e-12)

    dense = Dense.of(*case)
    first, last = flat_state(inner), flat_state(dense.states[-1])

    def along(betas):
        states = [at_point(inner, (1 - b) * first + b * last) for b in betas]
        line = Dense.of(problem, inner, lam, window)
        total, alpha = dense.direct[-1], dense.alpha[-1]
        for t in reversed(range(steps)):
            one = Dense.of(problem, states[t], lam, jax.tree.map(lambda x: x[t : t + 1], window))  # noqa: B023
            total, alpha = total + alpha @ one.B[0], alpha @ one.A[0]
        return line.tree(total)

    t = np.arange(1, steps + 1)
    assert relative_error(along((t - 1) / steps), exact) < 1e-12
    assert relative_error(along(np.linspace(0.001, 0.999, steps)), exact) > 1e-2
    assert relative_error(along(t / steps), exact) > 1e-2


def at_point(inner, flat):
    floating = (inner.params, inner.opt_state)
    return InnerState(*ravel_pytree(floating)[1](flat), inner.model_state)


def test_drmad_takes_counts_and_slots_as_they_were():
    """One step is exact for every state; integer leaves keep their true values on the way."""
    for problem_at in (integer_leaves, mlp_momentum):
        case = started(problem_at, 1)
        want = whole_window(reverse(1), *case).hypergrad
        assert_trees_close(whole_window(drmad(1), *case).hypergrad, want, 1e-12)
    got = whole_window(drmad(4), *started(integer_leaves, 4))
    assert int(got.inner.params["visits"]) == 4


def test_drmad_is_not_exact_on_a_curve():
    case = started(nested, 5)
    exact = whole_window(reverse(5), *case).hypergrad
    assert relative_error(whole_window(drmad(5), *case).hypergrad, exact) > 1e-3


def test_one_program_per_shape(compilations):
    """The estimators retrace nothing between updates."""
    problem, inner, lam, window = curved(RETRACEABLE["momentum"][0])
    for estimator in (reverse(T, memory="segments"), forward(T), drmad(T)):
        program = jax.jit(partial(estimator.estimate, problem))
        program((), inner, lam, window)
        other, before = jax.tree.map(lambda x: x * 1.1, lam), compilations()
        program((), inner, other, window)
        assert compilations() == before


def test_the_host_loop_compiles_segments_once(compilations):
    problem, inner, lam, window = curved(RETRACEABLE["momentum"][0], steps=13)
    settings = with_budget({"memory": "segments", "budget": "tight", "loop": "host"}, inner)
    unrolled_gradients(problem, inner, lam, window, **settings)
    other, before = jax.tree.map(lambda x: x * 1.1, lam), compilations()
    unrolled_gradients(problem, inner, other, window, **settings)
    assert compilations() == before


def test_an_operation_without_forward_mode_is_explained():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    dynamics = from_update(lambda w, lam, batch: w - lam * twice(w))
    problem = BilevelProblem(dynamics, lambda w, lam, batch: w)
    window = Window(jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(TypeError) as caught:
        forward(2).estimate(problem, (), InnerState(jnp.ones(()), ()), jnp.ones(()), window)
    assert any("use reverse mode" in note for note in caught.value.__notes__)
