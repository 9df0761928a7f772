"""Training with kinks: hypergradients of the lasso and its kin, and constrained outer problems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from scipy import optimize

from gradhpo import BilevelProblem, Task, Window, from_optax, from_update, tune
from gradhpo import estimators as gh
from gradhpo.outer import descent, followed_by
from gradhpo.solvers import cg, dense
from gradhpo.spaces import budget
from gradhpo.testing import relative_error
from gradhpo.transforms.proximal import elastic_net

pytestmark = pytest.mark.usefixtures("x64")
N, P = 30, 8


def lasso(seed):
    """Data, the step of ISTA with penalties exp(lam), lam = (log l1, log l2), and its limit."""
    draw = np.random.default_rng(seed)
    x, v = draw.standard_normal((2, N, P))
    w = draw.standard_normal(P) * (draw.random(P) < 0.5)
    y, z = (a @ w + 0.3 * draw.standard_normal(N) for a in (x, v))
    lam = {"l1": jnp.asarray(np.log(draw.uniform(0.05, 0.3))), "l2": jnp.asarray(np.log(0.02))}
    return (jnp.asarray(x), jnp.asarray(y)), (jnp.asarray(v), jnp.asarray(z)), lam


def ista(w, lam, batch):
    x, y = batch
    rate = 1 / jnp.linalg.norm(x.T @ x / N, 2)
    g = x.T @ (x @ w - y) / N
    return elastic_net(jnp.exp(lam["l1"]), jnp.exp(lam["l2"])).prox(w - rate * g, rate)


def judge(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) / 2


PROBLEM = BilevelProblem(from_update(ista), judge)


@jax.jit
def fitted(lam, train):
    return jax.lax.fori_loop(0, 20_000, lambda _, w: ista(w, lam, train), jnp.zeros(P))


def closed_form(train, val, lam):
    """On the active set A, with signs s: (H_A + l2) w_A = X_A' y / n - l1 s, so that
    dw_A / dlog l1 = -l1 (H_A + l2)^{-1} s and dw_A / dlog l2 = -l2 (H_A + l2)^{-1} w_A."""
    x, y = (np.asarray(a) for a in train)
    w = np.asarray(fitted(lam, train))
    active, (l1, l2) = w != 0, (float(jnp.exp(lam[k])) for k in ("l1", "l2"))
    a, s = x[:, active], np.sign(w[active])
    h = a.T @ a / N + l2 * np.eye(active.sum())
    found = np.linalg.solve(h, a.T @ y / N - l1 * s)
    np.testing.assert_allclose(found, w[active], atol=1e-12)
    v, z = (np.asarray(b) for b in val)
    alpha = v[:, active].T @ (v @ w - z) / N
    u = np.linalg.solve(h, alpha)
    return w, {"l1": -l1 * u @ s, "l2": -l2 * u @ found}


METHODS = {
    "reverse": gh.reverse(4000),
    "implicit_dense": gh.implicit(1, dense(), condition="fixed_point"),
    "implicit_gmres": gh.implicit(1, condition="fixed_point"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_lasso_is_differentiated_on_its_active_set(name):
    method = METHODS[name]

    hypergradient = differentiated(PROBLEM, method)
    for seed in range(20):
        train, val, lam = lasso(seed)
        w, want = closed_form(train, val, lam)
        assert (w != 0).any()
        start = jnp.zeros(P) if name == "reverse" else jnp.asarray(w)
        assert relative_error(hypergradient(start, lam, train, val), want) < 1e-8, seed


def differentiated(problem, method):
    """The hypergradient of training on the same batches at every step."""

    @jax.jit
    def hypergradient(w, lam, *batches):
        inner, steps = problem.dynamics.init(w, lam), method.unroll_steps
        window = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *jnp.shape(x))), batches)
        memory = method.init(inner, lam, Window(*window))
        return method.estimate(problem, memory, inner, lam, Window(*window)).hypergrad

    return hypergradient


def test_central_differences_where_the_active_set_is_stable():
    train, val, lam = lasso(3)
    w, want = closed_form(train, val, lam)
    for name in lam:
        ends = []
        for sign in (1, -1):
            at = lam | {name: lam[name] + sign * 1e-5}
            moved, _ = closed_form(train, val, at)
            assert ((moved != 0) == (w != 0)).all()
            ends.append(float(judge(moved, at, val)))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(want[name], rel=1e-6)


# -- the hinge, by its dual: maximise sum a - |sum a_i y_i x_i|^2 / 2 over 0 <= a <= exp(lam) ------


def dual_step(a, lam, batch):
    x, y = batch
    signed = x * y[:, None]
    q = signed @ signed.T
    return jnp.clip(a - (q @ a - 1) / jnp.linalg.norm(q, 2), 0, jnp.exp(lam))


def judge_margins(a, lam, batch):
    x, y, v, z = batch
    return jnp.mean(jnp.logaddexp(0, -z * (v @ ((x * y[:, None]).T @ a))))


@pytest.mark.parametrize("name", ["reverse", "implicit_dense"])
def test_a_support_vector_machine_is_differentiated_at_its_free_vectors(name):
    """With F between the bounds and C at the upper one, c = exp(lam): Q_FF a_F = 1 - c Q_FC 1."""
    problem = BilevelProblem(from_update(dual_step), judge_margins)
    method = {"reverse": gh.reverse(20_000), "implicit_dense": METHODS["implicit_dense"]}[name]
    hypergradient = differentiated(problem, method)
    draw = np.random.default_rng(5)
    x, v = draw.standard_normal((2, 20, 3))
    y, z = (np.sign(a @ [1.0, -1.0, 0.5] + draw.standard_normal(20)) for a in (x, v))
    lam, train, val = jnp.asarray(-0.5), (x, y), (x, y, v, z)
    end = jax.jit(lambda a: lax.fori_loop(0, 40_000, lambda _, a: dual_step(a, lam, train), a))
    a, c = np.asarray(end(jnp.zeros(20))), float(jnp.exp(lam))
    free, upper = (a > 0) & (a < c), a == c
    assert free.any() and upper.any()
    signed = x * y[:, None]
    q = signed @ signed.T
    slope = np.where(upper, c, 0.0)  # da / dlam
    slope[free] = np.linalg.solve(q[np.ix_(free, free)], -c * q[np.ix_(free, upper)].sum(1))
    want = jax.grad(judge_margins)(jnp.asarray(a), lam, val) @ slope
    got = hypergradient(jnp.zeros(20) if name == "reverse" else jnp.asarray(a), lam, train, val)
    assert float(got) == pytest.approx(float(want), rel=1e-8)


# -- a constrained outer problem ---------------------------------------------------------------

H = np.diag([1.0, 0.5, 0.8]) + 0.1
B = np.random.default_rng(7).standard_normal((3, 4))
GOAL = np.array([1.0, -0.5, 0.7])
TOTAL = 0.9


def train_loss(w, lam, batch):
    return w @ H @ w / 2 - w @ (B @ lam)


def val_loss(w, lam, batch):
    return jnp.sum((w - GOAL) ** 2) / 2 + 0.02 * jnp.sum(lam**2)


EXACT = {
    "reverse": gh.reverse(80),
    "reverse_segments": gh.reverse(80, memory="segments"),
    "forward": gh.forward(80),
    "implicit_minres": gh.implicit(80),
    "implicit_cg": gh.implicit(80, cg()),
    "implicit_dense": gh.implicit(80, dense()),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_constrained_problem_ends_where_a_general_solver_ends(name):
    """0 <= lam <= 1 with a budget, which binds, against SLSQP on the reduced problem."""

    def reduced(lam):
        return float(val_loss(np.linalg.solve(H, B @ lam), lam, None))

    found = optimize.minimize(
        reduced,
        np.full(4, 0.2),
        method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "ineq", "fun": lambda lam: TOTAL - lam.sum()},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    assert found.x.sum() == pytest.approx(TOTAL) and (found.x < 1e-9).any()

    outer = followed_by(descent(0.1), lambda lam: budget(lam, TOTAL))
    problem = BilevelProblem(from_optax(train_loss, optax.sgd(0.7)), val_loss)
    task = Task(problem, np.zeros(3), np.full(4, 0.2), lambda: 0.0, lambda: 0.0)
    state = tune(task, EXACT[name], outer, episodes=600, T=80)
    assert float(state.metadata["outer_stationarity"]) < 1e-6
    np.testing.assert_allclose(state.hyperparams, found.x, atol=1e-6)
