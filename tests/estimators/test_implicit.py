"""Implicit differentiation: every solver against dense algebra and the re-solved problem."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_formulas import whole_window

from gradhpo import (
    BilevelProblem,
    GradhpoWarning,
    ImplicitOptimizer,
    Status,
    Window,
    bilevel_step,
    cg,
    dense,
    from_optax,
    from_update,
    gmres,
    identity,
    implicit,
    init_state,
    minres,
    neumann,
    nystrom,
    one_step,
    reverse,
)
from gradhpo.testing import assert_trees_close, relative_error, richardson

pytestmark = pytest.mark.usefixtures("x64")
NOISE = np.random.default_rng(0)
HALF = NOISE.standard_normal((6, 6))
CURVATURE = HALF @ HALF.T / 6
DATA = NOISE.standard_normal(6)
LAM = {"penalty": NOISE.standard_normal(6) - 1, "shift": np.asarray(0.3)}
RATE = 0.05


@jax.jit
def train_loss(w, lam, batch):
    penalty = jnp.sum(jnp.exp(lam["penalty"]) * w**2)
    return (
        w @ CURVATURE @ w / 2 + penalty + jnp.sum(jnp.sin(0.3 * w * batch + lam["shift"] + batch))
    )


@jax.jit
def val_loss(w, lam, batch):
    return jnp.sum((w - batch) ** 2) + lam["shift"] * jnp.sum(lam["penalty"] * w)


@jax.jit
def minimum(lam):
    def newton(_, w):
        gradient = jax.grad(train_loss)(w, lam, DATA)
        return w - jnp.linalg.solve(jax.hessian(train_loss)(w, lam, DATA), gradient)

    return jax.lax.fori_loop(0, 30, newton, jnp.zeros(6))


def at_minimum(optimizer=None, steps=1, scale=1.0):
    def scaled(w, lam, batch):
        return scale * train_loss(w, lam, batch)

    dynamics = from_optax(scaled, optimizer or optax.sgd(RATE / scale))
    problem = BilevelProblem(dynamics, lambda w, lam, batch: scale * val_loss(w, lam, batch))
    window = Window(*(jnp.broadcast_to(DATA, (steps, 6)) for _ in range(2)))
    return problem, dynamics.init(minimum(LAM), LAM), jax.tree.map(jnp.asarray, LAM), window


@cache
def matrices():
    """(H, M, alpha, direct) at the minimum, by jax.hessian and jax.jacobian."""

    @jax.jit
    def dense_algebra(w, lam):
        H = jax.hessian(train_loss)(w, lam, DATA)
        M = jax.jacobian(jax.grad(train_loss), argnums=1)(w, lam, DATA)
        return H, M, *jax.grad(val_loss, argnums=(0, 1))(w, lam, DATA)

    return dense_algebra(minimum(LAM), LAM)


def from_u(u):
    _, M, _, direct = matrices()
    return jax.tree.map(lambda d, m: d - jnp.tensordot(u, m, axes=1), direct, M)


def hypergradient(solver, *case, **settings):
    return whole_window(implicit(1, solver, **settings), *case)


@cache
def solution():
    """The hypergradient by the dense solver, judged in the first test."""
    return hypergradient(dense(), *at_minimum())


def test_dense_is_the_derivative_of_the_re_solved_problem():
    """Newton to rounding at displaced hyperparameters."""
    got = solution()
    run = jax.jit(lambda lam: val_loss(minimum(lam), lam, DATA))
    oracle = richardson(run, LAM, 1e-3)
    assert_trees_close(got.hypergrad, oracle, 1e-9)
    assert got.info["stationarity"] < 1e-12
    H, _, alpha, _ = matrices()
    assert_trees_close(got.hypergrad, from_u(jnp.linalg.solve(H, alpha)), 1e-12)
    np.testing.assert_allclose(got.info["curvature"], jnp.linalg.eigvalsh(H)[0], rtol=1e-12)


def test_ridge_in_closed_form():
    """On ridge regression: dF/dlam = -e^lam grad L_val (X'X/n + e^lam I)^-1 w*."""
    x, y = NOISE.standard_normal((8, 4)), NOISE.standard_normal(8)
    x_val, y_val = NOISE.standard_normal((5, 4)), NOISE.standard_normal(5)

    def judge(w, lam, batch):
        a, b = batch
        return jnp.mean((a @ w - b) ** 2) / 2

    def ridge(w, lam, batch):
        return judge(w, lam, batch) + jnp.exp(lam) * w @ w / 2

    lam = jnp.asarray(-1.0)
    system = x.T @ x / 8 + np.exp(-1) * np.eye(4)
    w = np.linalg.solve(system, x.T @ y / 8)
    gradient = x_val.T @ (x_val @ w - y_val) / 5
    want = -np.exp(-1) * gradient @ np.linalg.solve(system, w)
    dynamics = from_optax(ridge, optax.sgd(0.1))
    window = jax.tree.map(lambda a: jnp.asarray(a)[None], Window((x, y), (x_val, y_val)))
    case = BilevelProblem(dynamics, judge), dynamics.init(jnp.asarray(w), lam), lam, window
    for solver in (dense(), cg(1e-12), neumann(4000, 0.3), gmres(1e-12)):
        np.testing.assert_allclose(hypergradient(solver, *case).hypergrad, want, rtol=1e-10)


def test_conjugate_gradients_are_dense():
    """In at most P products; and one step is alpha (alpha.alpha) / (alpha H alpha)."""
    H, _, alpha, _ = matrices()
    got = hypergradient(cg(1e-12), *at_minimum())
    assert_trees_close(got.hypergrad, from_u(jnp.linalg.solve(H, alpha)), 1e-10)
    assert got.info["linear_iterations"] <= 7 and got.info["status"] == Status.OK
    for loop in ("unroll", "host"):
        other = hypergradient(cg(1e-12, max_iterations=8), *at_minimum(), loop=loop)
        assert_trees_close(other.hypergrad, got.hypergrad, 1e-12)
    once = hypergradient(cg(max_iterations=1), *at_minimum())
    assert_trees_close(once.hypergrad, from_u(alpha * (alpha @ alpha) / (alpha @ H @ alpha)), 1e-12)
    assert once.info["status"] == Status.LINEAR_SOLVE_INACCURATE
    damped = hypergradient(cg(1e-12, damping=0.5), *at_minimum())
    want = from_u(jnp.linalg.solve(H + 0.5 * jnp.eye(6), alpha))
    assert_trees_close(damped.hypergrad, want, 1e-10)


@pytest.mark.parametrize("terms", [0, 1, 5, 40])
def test_neumann_is_its_sum_and_keeps_its_bound(terms):
    """The factor a included."""
    H, _, alpha, _ = matrices()
    eigenvalues = np.linalg.eigvalsh(H)
    a = 0.9 / eigenvalues[-1]
    powers = [alpha @ jnp.linalg.matrix_power(jnp.eye(6) - a * H, j) for j in range(terms + 1)]
    got = hypergradient(neumann(terms, float(a)), *at_minimum())
    assert_trees_close(got.hypergrad, from_u(a * sum(powers)), 1e-12)
    error = jnp.linalg.norm(a * sum(powers) - jnp.linalg.solve(H, alpha))
    bound = (1 - a * eigenvalues[0]) ** (terms + 1) / eigenvalues[0] * jnp.linalg.norm(alpha)
    assert error <= bound
    without_factor = from_u(sum(powers))
    assert relative_error(got.hypergrad, without_factor) > 1e-2


def test_neumann_converges_to_dense():
    H, _, alpha, _ = matrices()
    got = hypergradient(neumann(6000, 0.15), *at_minimum())
    assert_trees_close(got.hypergrad, from_u(jnp.linalg.solve(H, alpha)), 1e-10)


def test_neumann_is_truncated_reverse_at_a_stationary_point():
    """K iterations, K + 1 steps of gradient descent with rate a."""
    for terms in (0, 3, 9):
        problem, inner, lam, window = at_minimum(steps=terms + 1)
        want = whole_window(reverse(terms + 1), problem, inner, lam, window).hypergrad
        got = hypergradient(neumann(terms, RATE), *at_minimum()).hypergrad
        assert_trees_close(got, want, 1e-10)
        late = hypergradient(neumann(terms + 1, RATE), *at_minimum()).hypergrad
        assert relative_error(late, want) > 1e-3


def test_identity_is_one_step_at_the_minimum():
    """With the inner learning rate for a."""
    want = whole_window(one_step(), *at_minimum()).hypergrad
    assert_trees_close(hypergradient(identity(RATE), *at_minimum()).hypergrad, want, 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_nystrom_is_its_formula(rank):
    """(C W^-1 C' + rho I)^-1; all of H at full rank."""
    H, _, alpha, _ = matrices()
    rho = 1e-3
    key = jax.random.fold_in(jax.random.key(5), 0)
    index = jax.random.permutation(key, 6)[:rank]
    C, W = H[:, index], H[index][:, index]
    low = C @ jnp.linalg.solve(W, C.T)
    u = nystrom(rank, rho)(lambda v: v @ H, alpha, None, key, "scan").u
    assert_trees_close(u, jnp.linalg.solve(low + rho * jnp.eye(6), alpha), 1e-10)
    got = hypergradient(nystrom(rank, rho), *at_minimum(), seed=5)
    if rank == 6:
        full = from_u(jnp.linalg.solve(H + rho * jnp.eye(6), alpha))
        assert_trees_close(got.hypergrad, full, 1e-10)
    else:  # in the directions not seen H is taken for rho, a thousandth of what it is
        assert got.info["linear_residual"] > 10
        assert got.info["status"] == Status.LINEAR_SOLVE_FAILED


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_fixed_point_form_is_gradient_form(momentum):
    """Whatever the rate, and with the velocity in the state."""
    want = solution().hypergrad
    for rate in (0.01, RATE):
        case = at_minimum(optax.sgd(rate, momentum=momentum))
        for solver in (dense(), gmres(1e-12)):
            got = hypergradient(solver, *case, condition="fixed_point")
            assert_trees_close(got.hypergrad, want, 1e-8)
            assert got.info["stationarity"] < 1e-12


def test_fixed_point_of_an_update_fn():
    """The same by a step that is opaque, and refused without a loss."""
    want = solution().hypergrad
    _, inner, lam, window = at_minimum()
    dynamics = from_update(lambda w, lam, b: w - RATE * jax.grad(train_loss)(w, lam, b))
    problem = BilevelProblem(dynamics, val_loss)
    got = hypergradient(dense(), problem, inner, lam, window, condition="fixed_point")
    assert_trees_close(got.hypergrad, want, 1e-8)
    with pytest.raises(ValueError, match="give BilevelProblem\\(..., train_loss=loss\\)"):
        hypergradient(dense(), problem, inner, lam, window)
    told = problem._replace(train_loss=train_loss)
    assert_trees_close(hypergradient(dense(), told, inner, lam, window).hypergrad, want, 1e-10)


def test_a_condition_of_the_users_own():
    """Not a gradient and not symmetric: c(w, lam) = S grad L has the same zeros."""
    shear = jnp.eye(6) + jnp.tril(jnp.ones((6, 6)), -1)

    def condition(w, lam, batch):
        return shear @ jax.grad(train_loss)(w, lam, batch)

    want = solution().hypergrad
    for solver in (dense(), gmres(1e-12)):
        got = hypergradient(solver, *at_minimum(), condition=condition).hypergrad
        assert_trees_close(got, want, 1e-8)
    with pytest.raises(ValueError, match="'training_loss', 'fixed_point' or a function"):
        implicit(condition="loss")


def test_optimizer_hyperparameters_are_refused():
    """The minimum does not depend on them; with a fixed point the answer is zero."""

    def rated(lam):
        return optax.sgd(jnp.exp(lam["rate"]))

    _, inner, lam, window = at_minimum()
    lam = {**lam, "rate": jnp.asarray(-3.0)}
    problem = BilevelProblem(from_optax(train_loss, rated), val_loss)
    with pytest.raises(ValueError, match=r"cannot tune the leaf \['rate'\].*learning rates"):
        hypergradient(cg(), problem, inner, lam, window)
    with pytest.warns(GradhpoWarning, match=r"\['rate'\] acts through the optimizer alone"):
        got = hypergradient(dense(), problem, inner, lam, window, condition="fixed_point")
    assert abs(got.hypergrad["rate"]) < 1e-10
    opt = ImplicitOptimizer(inner_optimizer=rated, T=1)
    with pytest.raises(ValueError, match=r"cannot tune the leaf \['rate'\]"):
        state = opt.init(inner.params, lam)
        opt.compute_hypergradient(state, DATA, DATA, train_loss, val_loss)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_the_scale_of_the_loss_changes_nothing(scale, wide, monkeypatch):
    """h is that of the unscaled losses times the scale of the validation loss."""
    if not wide:
        jax.config.update("jax_enable_x64", False)
        for name in ("CURVATURE", "DATA", "LAM"):
            value = jax.tree.map(np.float32, globals()[name])
            monkeypatch.setitem(globals(), name, value)

    def run(scale):
        return hypergradient(cg(1e-9 if wide else 1e-5), *at_minimum(scale=scale))

    plain, got = run(1.0), run(scale)
    assert_trees_close(
        optax.tree.scale(1 / scale, got.hypergrad), plain.hypergrad, 1e-8 if wide else 1e-3
    )
    assert got.info["status"] == Status.OK
    assert got.info["linear_residual"] < (1e-9 if wide else 1e-4)


def test_a_saddle_is_flagged_and_nan_is_no_success():
    def saddle(w, lam, batch):
        return w[0] ** 2 - w[1] ** 2 + lam * jnp.sum(w)

    dynamics = from_optax(saddle, optax.sgd(0.1))
    judge = partial(lambda w, lam, batch: jnp.sum((w - 1) ** 2))
    problem, lam = BilevelProblem(dynamics, judge), jnp.asarray(0.5)
    window = Window(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    inner = dynamics.init(jnp.array([0.1, -0.2]), lam)
    for solver in (dense(), None):
        got = hypergradient(solver, problem, inner, lam, window)
        assert got.info["status"] == Status.NEGATIVE_CURVATURE
        assert got.info["curvature"] < 0 and np.isfinite(got.hypergrad)
    # One stops at its first direction and has nothing, the other diverges along w_1.
    for solver in (cg(), neumann(3, 0.1)):
        got = hypergradient(solver, problem, inner, lam, window)
        assert got.info["status"] == Status.LINEAR_SOLVE_FAILED
        assert got.info["curvature"] < 0 and np.isnan(got.hypergrad)

    def broken(w, lam, batch):  # a finite gradient, a Hessian of NaN
        return jnp.sum(jnp.abs(w - w) ** 1.5) + lam * jnp.sum(w**2)

    problem = problem._replace(dynamics=from_optax(broken, optax.sgd(0.0)))
    estimator = implicit(1, cg())
    state = init_state(problem, estimator, optax.sgd(0.1), inner.params, lam, window)
    state = bilevel_step(estimator, optax.sgd(0.1))(problem, state, window)
    assert state.metadata["status"] == Status.LINEAR_SOLVE_FAILED
    assert state.hyperparams == lam


def test_far_from_a_minimum_the_distance_is_reported():
    problem, _, lam, window = at_minimum()
    inner = problem.dynamics.init(jnp.full(6, 3.0), lam)
    got = hypergradient(cg(), problem, inner, lam, window)
    assert got.info["stationarity"] > 1
    after = got.inner.params
    want = jnp.linalg.norm(jax.grad(train_loss)(after, lam, DATA))
    np.testing.assert_allclose(got.info["stationarity"], want, rtol=1e-12)


def test_a_warm_start_is_used_and_can_be_worse_than_none():
    case = problem, inner, lam, window = at_minimum()
    warm, cold = implicit(1, cg(1e-10)), implicit(1, cg(1e-10), warm_start=False)
    memory = whole_window(warm, *case).memory
    again = warm.estimate(problem, memory, inner, lam, window)
    assert again.info["linear_iterations"] == 0
    assert cold.estimate(problem, memory, inner, lam, window).info["linear_iterations"] > 3
    useless = memory._replace(u=jnp.full(6, 1e6))
    got = warm.estimate(problem, useless, inner, lam, window)
    assert_trees_close(got.hypergrad, again.hypergrad, 1e-8)


def test_a_validation_loss_without_weights_has_no_indirect_term():
    _, inner, lam, window = at_minimum()
    problem = at_minimum()[0]._replace(
        outer_loss=lambda w, lam, batch: jnp.sum(lam["penalty"] ** 2)
    )
    for solver in (cg(), dense(), neumann(), nystrom(3)):
        got = hypergradient(solver, problem, inner, lam, window)
        assert got.info["indirect_norm"] == 0 and got.info["status"] == Status.OK
        assert_trees_close(got.hypergrad["penalty"], 2 * lam["penalty"], 1e-14)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nystrom(3, 0.0), ValueError, "must be positive"),
        (lambda: neumann(-1), ValueError, "terms must be at least 0"),
        (lambda: neumann(3, -0.1), ValueError, "step_size of a Neumann series must be positive"),
        (lambda: identity(0.0), ValueError, "step_size of a Neumann series must be positive"),
        (lambda: cg(100), ValueError, r"got 100\. For a number .* write cg\(max_iterations=100\)"),
        (lambda: minres(200), ValueError, r"write minres\(max_iterations=200\)"),
        (lambda: gmres(-0.1), ValueError, "at least 0 and below 1, got -0.1"),
        (lambda: cg(damping=-0.1), ValueError, "damping .* must not be negative, got -0.1"),
        (lambda: dense(-1.0), ValueError, "damping .* must not be negative, got -1"),
        (lambda: minres(max_iterations=1), ValueError, "max_iterations must be at least 2"),
        (lambda: cg(max_iterations=0), ValueError, "max_iterations must be at least 1"),
        (lambda: cg(tolerance="tight"), TypeError, "tolerance must be a number"),
        (lambda: ImplicitOptimizer(inner_optimizer=optax.sgd(0.1)), ValueError, "needs T="),
        (
            lambda: ImplicitOptimizer(inner_optimizer=optax.sgd(0.1), T=1, solver="cg"),
            TypeError,
            "solver must be a function",
        ),
    ],
)
def test_wrong_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_class_tunes_a_penalty():
    """`run`, with a fresh batch per step, ends near the best penalty in closed form."""
    opt = ImplicitOptimizer(inner_optimizer=optax.sgd(0.2), outer_optimizer=optax.adam(0.1), T=10)

    def ridge(w, lam, batch):
        return jnp.sum((w - batch) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2) / 2

    def judge(w, lam, batch):
        return jnp.sum((w - batch / 2) ** 2) / 2  # w* = batch / (1 + exp(lam)): lam = 0

    state = opt.run(
        opt.init(jnp.zeros(3), jnp.asarray(-2.0)),
        M=60,
        get_train_batch=lambda: np.ones(3),
        get_val_batch=lambda: np.ones(3),
        train_loss_fn=ridge,
        val_loss_fn=judge,
    )
    assert abs(state.hyperparams) < 0.05
    assert state.metadata["linear_residual"] < 1e-5


def test_curvature_of_conjugate_gradients_is_a_rayleigh_quotient():
    """Of the directions met: never below the smallest eigenvalue."""
    d = np.array([1.0, 10.0, 100.0])
    got = cg(1e-14)(lambda u: d * u, jnp.ones(3), jnp.zeros(3), jax.random.key(0), "scan")
    r, p, seen = np.ones(3) / np.sqrt(3), np.ones(3) / np.sqrt(3), []
    for _ in range(int(got.iterations)):
        seen.append(p @ (d * p) / (p @ p))
        new = r - (r @ r) / (p @ (d * p)) * d * p
        r, p = new, new + (new @ new) / (r @ r) * p
    x = 1 / d
    np.testing.assert_allclose(got.curvature, min(*seen, x @ (d * x) / (x @ x)), rtol=1e-8)
    assert got.curvature >= 1.0


def test_a_series_that_diverges_is_cut_off_and_flagged():
    got = neumann(20, 5.0)(lambda u: 2 * u, jnp.ones(3), jnp.zeros(3), jax.random.key(0), "scan")
    assert got.residual > 1e-2
    assert jnp.abs(got.u).max() <= 5.0 * 10  # a few terms, none above ten times alpha


def test_a_condition_of_the_other_sign_is_no_saddle():
    want = solution()

    def descent(w, lam, batch):
        return -jax.grad(train_loss)(w, lam, batch)

    got = hypergradient(None, *at_minimum(), condition=descent)
    assert_trees_close(got.hypergrad, want.hypergrad, 1e-5)
    assert got.info["status"] == Status.OK


@pytest.mark.parametrize("solver", [cg(), dense(), nystrom(4), gmres(), neumann(50, 0.3)])
def test_narrow_weights_are_solved_for_in_float32(solver):
    def loss(w, lam, batch):
        flat = jnp.concatenate([w["a"].astype(jnp.float32), w["b"]])
        return jnp.sum(jnp.exp(lam) * flat**2) / 2 + jnp.sum((flat - 1) ** 2) / 2

    def judge(w, lam, batch):
        return sum(jnp.sum((x.astype(jnp.float32) - 2) ** 2) for x in w.values())

    dynamics = from_optax(loss, optax.sgd(0.1))
    w = {"a": jnp.full(2, 0.5, jnp.bfloat16), "b": jnp.full(2, 0.5, jnp.float32)}
    lam = jnp.zeros(4, jnp.float32)
    window = Window(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    got = hypergradient(solver, BilevelProblem(dynamics, judge), dynamics.init(w, lam), lam, window)
    assert np.all(np.isfinite(got.hypergrad)) and got.hypergrad.dtype == jnp.float32
    np.testing.assert_allclose(got.hypergrad, 3.0 * 0.5 / 2, rtol=0.06)  # nystrom: damped by 0.1
