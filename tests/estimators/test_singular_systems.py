"""Hessians without an inverse: the least-squares answer, or an update that is refused.

More weights than examples, mini-batches, a bias without a penalty: H has a null space, and
alpha, which is of other data, need not stand in its range.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    ImplicitOptimizer,
    Status,
    Window,
    bilevel_step,
    cg,
    cgls,
    dense,
    from_optax,
    gmres,
    identity,
    implicit,
    init_state,
    minres,
    neumann,
    nystrom,
)
from gradhpo.solvers import Solution
from gradhpo.testing import assert_trees_close
from gradhpo.utils._jaxpr import equations

SEEDS = 5
SHAPES = [(20, 5), (40, 25), (60, 36), (30, 29)]  # weights, rank: 20 problems
SOLVERS = {
    "minres": minres(),
    "dense": dense(),
    "cg": cg(),
    "gmres": gmres(),
    "cgls": cgls(),
    "neumann": neumann(20, 0.1),
    "nystrom": nystrom(10, 1e-2),
}


def systems(size, rank, dtype=np.float64):
    """G, alpha and alpha times the pseudo-inverse; every second alpha in the range of G."""
    found = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(1000 * size + seed)
        half = rng.standard_normal((rank, size))
        G = half.T @ half / rank
        b = rng.standard_normal(size)
        b = G @ b if seed % 2 else b
        values = np.linalg.lstsq(G, b, rcond=1e-9)[0]
        found.append((G.astype(dtype), b.astype(dtype), values))
    return map(np.stack, zip(*found, strict=True))


def solve_all(solver, G, b):
    """One program for all seeds."""

    @jax.jit
    @jax.vmap
    def solve(G, b):
        return solver(lambda u: u @ G, b, jnp.zeros_like(b), jax.random.key(0), "scan")

    return solve(jnp.asarray(G), jnp.asarray(b))


def errors(got, want):
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


@pytest.mark.parametrize("size, rank", SHAPES)
def test_the_default_solver_is_the_pseudo_inverse(size, rank, x64):
    G, b, want = systems(size, rank)
    # The one that forms normal equations goes without the last shape.
    for solver in (minres(), dense(), cgls())[: 2 if size == 30 else 3]:
        got = solve_all(solver, G, b)
        # The last shape has condition numbers up to 1e6, the others below 1e3.
        assert errors(got.u, want).max() < 1e-4, (errors(got.u, want), got.residual)
        inside = np.einsum("ni,nij->nj", got.u, G) - b
        residual = np.linalg.norm(inside, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(got.residual, residual, rtol=1e-6, atol=1e-12)
        assert got.least_squares[::2].all() and (got.residual[::2] > 1e-2).all()
        assert (got.curvature >= 0).all()


@pytest.mark.parametrize("size, rank", SHAPES[:3])
def test_in_float32_to_fewer_digits(size, rank, x32):
    """The errors stand in the null space for the most part; what G sees of them is less."""
    G, b, want = systems(size, rank, np.float32)
    got = solve_all(minres(), G, b)
    assert errors(got.u, want).max() < 2e-2
    seen = partial(np.einsum, "ni,nij->nj", optimize=True)
    assert errors(seen(np.float64(got.u), G), seen(want, G)).max() < 1e-4
    assert got.least_squares[::2].all() and (got.curvature >= 0).all()


def test_an_indefinite_singular_system_is_solved_too(x64):
    rng = np.random.default_rng(3)
    half = rng.standard_normal((SEEDS, 20, 30))
    G = np.einsum("nki,k,nkj->nij", half, np.sign(rng.standard_normal(20)), half) / 20
    b = rng.standard_normal((SEEDS, 30))
    got = solve_all(minres(), G, b)
    want = np.stack([np.linalg.lstsq(*pair, rcond=1e-9)[0] for pair in zip(G, b, strict=True)])
    assert errors(got.u, want).max() < 1e-4
    assert got.least_squares.all() and (got.curvature < 0).all()


@pytest.mark.parametrize(
    "solver, most", [(minres(), 40), (minres(max_iterations=70), 70)], ids=["default", "70"]
)
def test_fewer_iterations_are_written_out(solver, most):
    """The compiler takes a second or more for each, so the default has fewer than a loop."""

    def scans(loop):
        G, b, key = jnp.eye(3), jnp.ones(3), jax.random.key(0)
        jaxpr = jax.make_jaxpr(lambda b: solver(lambda u: u @ G, b, b, key, loop))(b).jaxpr
        return [e.params["length"] for e in equations(jaxpr) if e.primitive.name == "scan"]

    assert scans("unroll") == scans("host") == [most - 1]  # the first product makes no step
    assert not scans("scan")  # a loop of unknown length


def test_conjugate_gradients_keep_their_best_iterate(x64):
    """More iterations never leave a larger residual, on systems on which the method diverges."""
    G, b, _ = systems(20, 5)
    before = np.full(SEEDS, 1.0)
    for most in (1, 2, 4, 8, 100):
        residual = solve_all(cg(1e-6, most), G, b).residual
        assert (residual <= before + 1e-9).all()
        before = residual
    assert (before[1::2] < 1e-5).all()  # where there is a solution it is found
    # Tolerance 0: so many iterations, however good the first.
    assert (solve_all(cg(0.0, 2), np.stack([np.eye(20) + G[0]]), b[:1]).iterations == 2).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_semidefinite_is_not_negative(name, x32):
    """Rounding makes the zero eigenvalues of H negative as often as not."""
    G, b, _ = systems(20, 5, np.float32)
    assert not (solve_all(SOLVERS[name], G, b).curvature < 0).any()


@pytest.mark.parametrize("name", SOLVERS)
def test_tiny_and_huge_right_hand_sides(name, x32):
    """The squares of 1e-22 and 1e22 are no float32 numbers."""
    G, b, _ = systems(20, 5, np.float32)
    G, b = G[1], b[1] / np.linalg.norm(b[1])  # a system with a solution
    scales = np.float32([1.0, 1e-22, 1e22])
    got = solve_all(SOLVERS[name], np.stack([G] * 3), scales[:, None] * b)
    np.testing.assert_allclose(got.u[1] * 1e22, got.u[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.u[2] * 1e-22, got.u[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.residual, got.residual[0], atol=1e-4)


@pytest.mark.parametrize("solver", [minres(), cg()], ids=["minres", "cg"])
def test_tiny_losses_and_leaves_of_two_dtypes(solver, x64):
    """Both losses times 1e-22 leave u as it is."""
    G, b, want = (np.stack(x)[1] for x in systems(20, 5))

    def solve(scale):
        tree = {"a": jnp.float32(scale * b[:8]), "b": jnp.asarray(scale * b[8:])}

        def product(u):
            out = scale * (jnp.concatenate([u["a"].astype(float), u["b"]]) @ G)
            return {"a": out[:8].astype(jnp.float32), "b": out[8:]}

        zeros = jax.tree.map(jnp.zeros_like, tree)
        return solver(product, tree, zeros, jax.random.key(0), "scan").u

    got = jax.jit(jax.vmap(solve))(jnp.array([1.0, 1e-22, 1e22]))
    assert got["a"].dtype == jnp.float32 and got["b"].dtype == jnp.float64
    for u in np.concatenate([got["a"], got["b"]], axis=1):
        np.testing.assert_allclose(u, want, atol=1e-4 * np.linalg.norm(want))


# -- updates ------------------------------------------------------------------------------------


def train_loss(w, lam, batch):
    """H = x' x / n; M = (-H, 1), so that the tilt sees u itself, null space and all."""
    x, y = batch
    return jnp.mean((x @ (w - lam["shift"]) - y) ** 2) / 2 + lam["tilt"] @ w


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) / 2


def problem():
    return BilevelProblem(from_optax(train_loss, optax.sgd(0.05)), val_loss)


def batches(update, size=20, examples=6):
    """A window per seed; the odd seeds validate on their training inputs: alpha in the range."""
    rng = np.random.default_rng(update)
    x, x_val = rng.standard_normal((2, SEEDS, 1, examples, size))
    x_val[1::2] = x[1::2]
    y, y_val = rng.standard_normal((2, SEEDS, 1, examples))
    return jax.tree.map(jnp.asarray, Window((x, y), (x_val, y_val)))


def start(estimator, size=20):
    w, lam = jnp.zeros(size), {"shift": jnp.zeros(size), "tilt": jnp.zeros(size)}
    return init_state(problem(), estimator, optax.sgd(1.0), w, lam)


def least_squares_hypergradient(w, window):
    (x, _), (x_val, y_val) = (jax.tree.map(lambda a: np.float64(a[0]), side) for side in window)
    H = x.T @ x / len(x)
    u = np.linalg.lstsq(H, x_val.T @ (x_val @ w - y_val) / len(x_val), rcond=1e-6)[0]
    return {"shift": u @ H, "tilt": -u}


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_every_update_is_that_of_least_squares(wide, request):
    """Mini-batches with six examples for twenty weights; the state goes on from update to update,
    while the null space changes."""
    request.getfixturevalue("x64" if wide else "x32")
    estimator, task = implicit(1), problem()
    step = jax.jit(jax.vmap(partial(bilevel_step(estimator, optax.sgd(1.0)), task)))
    states = jax.vmap(lambda _: start(estimator))(jnp.arange(SEEDS))
    for update in range(4):
        window, before = batches(update), states.hyperparams
        states = step(states, window)
        moved = jax.tree.map(lambda a, b: a - b, before, states.hyperparams)
        for seed in range(SEEDS):
            here = partial(jax.tree.map, lambda a: np.asarray(a)[seed])  # noqa: B023
            want = least_squares_hypergradient(np.float64(states.params[seed]), here(window))
            assert_trees_close(here(moved), jax.tree.map(jnp.asarray, want), 1e-6 if wide else 1e-3)
        assert (states.metadata["status"][::2] == Status.SINGULAR_SYSTEM).all()
        assert (states.metadata["status"][1::2] == Status.OK).all()
    assert not states.metadata["n_rejected"].any()


@pytest.mark.parametrize(
    "dtype, solver",
    [(jnp.float16, None), (jnp.bfloat16, None), (jnp.float16, dense()), (jnp.bfloat16, cgls())],
    ids=["minres, float16", "minres, bfloat16", "dense, float16", "cgls, bfloat16"],
)
def test_products_with_narrow_weights_are_believed_to_their_digits(dtype, solver, x32):
    """What they leave in the null space is rounding, however many digits float32 has."""
    estimator, task = implicit(1, solver), problem()
    window = jax.tree.map(lambda a: a.astype(dtype), batches(0))
    lam = start(estimator).hyperparams
    before = init_state(task, estimator, optax.sgd(1.0), jnp.zeros(20, dtype), lam)
    after = jax.jit(jax.vmap(partial(bilevel_step(estimator, optax.sgd(1.0)), task, before)))(
        window
    )
    for seed in range(SEEDS):
        here = partial(jax.tree.map, lambda a: np.asarray(a)[seed])  # noqa: B023
        want = least_squares_hypergradient(np.float64(after.params[seed]), here(window))
        moved = jax.tree.map(lambda a: -np.float64(a), here(after.hyperparams))
        off = {name: errors(moved[name][None], want[name][None])[0] for name in want}
        assert off["shift"] < 0.05 and off["tilt"] < 0.5, off
    assert (after.metadata["status"][::2] == Status.SINGULAR_SYSTEM).all()


@jax.custom_vjp
def by_own_rule(r):
    return r


by_own_rule.defvjp(lambda r: (r, None), lambda _, g: (g,))  # the true one; who could know


def own_rule_loss(w, lam, batch):
    return train_loss(w, lam, batch[:1] + (by_own_rule(batch[1] + 0 * w[0]),))


@pytest.mark.parametrize("condition", ["training_loss", "fixed_point"])
def test_systems_not_known_to_be_symmetric_by_least_squares_too(condition, x64):
    """A custom gradient, and the fixed point of gradient descent: where gmres breaks down."""
    loss = own_rule_loss if condition == "training_loss" else train_loss
    task = problem()._replace(dynamics=from_optax(loss, optax.sgd(0.05)))
    estimator, window = implicit(1, condition=condition), batches(0)
    step = jax.jit(jax.vmap(partial(bilevel_step(estimator, optax.sgd(1.0)), task)))
    states = jax.vmap(lambda _: start(estimator))(jnp.arange(SEEDS))
    after = step(states, window)
    for seed in range(SEEDS):
        here = partial(jax.tree.map, lambda a: np.asarray(a)[seed])  # noqa: B023
        want = least_squares_hypergradient(np.float64(after.params[seed]), here(window))
        moved = jax.tree.map(lambda a: -a, here(after.hyperparams))
        assert_trees_close(moved, jax.tree.map(jnp.asarray, want), 1e-5)
    assert (after.metadata["status"][::2] == Status.SINGULAR_SYSTEM).all()
    assert (after.metadata["status"][1::2] == Status.OK).all()


def ten_times(product, alpha, start, key, loop):
    """A user's own solver, and a bad one: it believes what it returns."""
    del product, start, key, loop
    u = jax.tree.map(lambda a: 10 * a, alpha)
    return Solution(u, jnp.int32(0), jnp.asarray(11.0), jnp.asarray(1.0))


def not_a_number(product, alpha, start, key, loop):
    found = ten_times(product, alpha, start, key, loop)
    return found._replace(u=jax.tree.map(lambda a: a * jnp.nan, alpha), residual=jnp.nan)


def hardly_worse(product, alpha, start, key, loop):
    """Least squares leave no more than u = 0 does: whatever claims it and leaves more is wrong."""
    found = ten_times(product, alpha, start, key, loop)
    return found._replace(residual=jnp.asarray(1.0005), least_squares=jnp.asarray(True))


BAD = {
    "identity": identity(10.0),
    "neumann": neumann(20, 5.0),
    "nystrom": nystrom(1, 1e-3),
    "own": ten_times,
    "own, NaN": not_a_number,
    "own, no least squares": hardly_worse,
}


@pytest.mark.parametrize("name", BAD)
def test_a_solution_worse_than_none_moves_nothing(name, x32):
    estimator, task = implicit(1, BAD[name]), problem()
    before = start(estimator)
    kept = before.memory.u + 0.25  # what an earlier update had found
    before = before.update(memory=before.memory._replace(u=kept))
    window = jax.tree.map(lambda a: a[0], batches(0))
    after = bilevel_step(estimator, optax.sgd(1.0))(task, before, window)
    assert after.metadata["status"] == Status.LINEAR_SOLVE_FAILED
    assert not after.metadata["linear_residual"] <= 1 and after.metadata["n_rejected"] == 1
    assert_trees_close(after.hyperparams, before.hyperparams, 0)
    np.testing.assert_array_equal(after.memory.u, kept)
    assert after.memory.draws == 1  # other coordinates next time
    assert (after.params != before.params).all()  # training goes on


@pytest.mark.parametrize("name", ["cg", "gmres"])
def test_lambda_never_moves_by_a_bad_solve(name, x32):
    """Thirty mini-batches, on which these solvers have no solution to find."""
    estimator, task = implicit(1, SOLVERS[name]), problem()

    def update(state, window):
        new = bilevel_step(estimator, optax.sgd(1.0))(task, state, window)
        moved = optax.tree.norm(optax.tree.sub(new.hyperparams, state.hyperparams)) > 0
        return new, (moved, new.metadata)

    windows = jax.tree.map(lambda *a: jnp.stack(a)[:, 0], *(batches(k) for k in range(30)))
    _, (moved, seen) = jax.jit(partial(jax.lax.scan, update))(start(estimator), windows)
    assert (moved <= (seen["linear_residual"] < 1)).all()
    assert not np.isnan(seen["linear_residual"]).any() and np.isfinite(seen["curvature"]).all()
    assert (seen["hypergrad_norm"][moved] < 100).all()  # least squares: about 10
    assert (seen["status"][~moved] == Status.LINEAR_SOLVE_FAILED).all()
    assert not moved.all()


def test_a_refused_hypergradient_is_shown_as_nan(x32):
    opt = ImplicitOptimizer(inner_optimizer=optax.sgd(0.05), T=1, solver=identity(10.0))
    state = opt.init(jnp.zeros(20), {"shift": jnp.zeros(20), "tilt": jnp.zeros(20)})
    train, val = jax.tree.map(lambda a: a[0, 0], tuple(batches(0)))
    got = opt.compute_hypergradient(state, train, val, train_loss, val_loss)
    assert all(np.isnan(x).all() for x in got.values())


@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_a_tiny_or_huge_hypergradient_is_taken(scale, x32):
    task = problem()._replace(outer_loss=lambda w, lam, b: scale * val_loss(w, lam, b))
    plain, before = implicit(1), start(implicit(1))
    window = jax.tree.map(lambda a: a[0], batches(0))
    want = bilevel_step(plain, optax.sgd(1.0))(problem(), before, window)
    got = bilevel_step(plain, optax.sgd(1 / scale))(task, before, window)
    assert got.metadata["status"] == want.metadata["status"] == Status.SINGULAR_SYSTEM
    assert_trees_close(got.hyperparams, want.hyperparams, 1e-4)


def condition(w, lam, batch):
    return jax.grad(train_loss)(w, lam, batch)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"solver": minres(max_iterations=3)}, id="minres"),
        pytest.param({"solver": cg(max_iterations=3)}, id="cg"),
        pytest.param({"solver": neumann(3, 0.1)}, id="neumann"),
        pytest.param({"solver": nystrom(3)}, id="nystrom"),
        pytest.param({"solver": dense()}, id="dense"),
        pytest.param({"condition": condition}, id="gmres, a condition"),
        pytest.param({"condition": "fixed_point"}, id="gmres, a fixed point"),
    ],
)
def test_a_host_loop_compiles_once(settings, compilations):
    estimator, task = implicit(2, loop="host", **settings), problem()
    step, state = bilevel_step(estimator, optax.sgd(0.1)), start(estimator, 4)
    window = jax.tree.map(lambda a: jnp.repeat(a[0], 2, axis=0), batches(0, size=4))
    for _ in range(2):
        state = step(task, state, window)
    before = compilations()
    state = step(task, state, window)
    assert compilations() == before


def test_a_solver_that_finds_nothing_is_refused(x32):
    """Conjugate gradients keep u = 0 where every iterate is worse: no hypergradient, not a part."""
    estimator, task = implicit(1, cg()), problem()
    window = jax.tree.map(lambda a: a[0], batches(0))
    seen = bilevel_step(estimator, optax.sgd(1.0))(task, start(estimator), window).metadata
    np.testing.assert_allclose(seen["linear_residual"], 1, atol=1e-6)
    assert seen["status"] == Status.LINEAR_SOLVE_FAILED and seen["n_rejected"] == 1
    # In a null space as large as all of alpha, u = 0 is the least-squares answer, and is taken.
    flat = task._replace(outer_loss=lambda w, lam, batch: w[0] + jnp.sum(lam["shift"]))
    (x, y), val = window
    window = Window((x.at[..., 0].set(0), y), val)
    state = start(implicit(1))
    seen = bilevel_step(implicit(1), optax.sgd(1.0))(flat, state, window).metadata
    assert seen["status"] == Status.SINGULAR_SYSTEM and seen["n_rejected"] == 0
