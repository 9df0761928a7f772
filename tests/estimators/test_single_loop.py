"""SOBA, SABA, AmIGO, StocBiO and F2SA against dense matrices, their limits, and their bars.

Float64. Nothing on the right-hand side uses the library's products: H and M are matrices
of the raveled problem, and every update is written out once more.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_formulas import at, started
from jax.flatten_util import ravel_pytree

from gradhpo import (
    BilevelProblem,
    InnerState,
    InOrder,
    Task,
    Window,
    bilevel_step,
    from_optax,
    init_state,
)
from gradhpo.algorithms.single_loop import (
    AmIGOOptimizer,
    F2SAOptimizer,
    SABAOptimizer,
    SOBAOptimizer,
    StocBiOOptimizer,
)
from gradhpo.core.episode import start_episode
from gradhpo.core.loop import run_episode
from gradhpo.core.status import Status
from gradhpo.core.types import DataBatch
from gradhpo.datasets.dataset import Dataset
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.f2sa import f2sa
from gradhpo.estimators.saba import saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.report import write
from gradhpo.studies.single_loop import study
from gradhpo.studies.single_loop.problem import exact
from gradhpo.studies.single_loop.problem import split as split_data
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.testing.problems import (
    learning_rates,
    outer_lam,
    ridge_adam,
)
from gradhpo.utils._partition import merge, split

pytestmark = pytest.mark.usefixtures("x64")
T = 3
TOLERANCE = 1e-12


def tree(steps):
    """Nested weights with an integer leaf, momentum, two leaves of lam."""
    draw = np.random.default_rng(7)
    x, v = (jnp.asarray(draw.normal(size=(steps, 6, 3))) for _ in range(2))

    def predict(w, x):
        return jnp.tanh(x @ w["in"]["a"] + w["order"] / 5) @ w["out"]

    def train(w, lam, x):
        penalty = jnp.exp(lam["l2"]) * jnp.sum(w["in"]["a"] ** 2) + jnp.sum(w["out"] ** 4)
        return jnp.mean((predict(w, x) - x[:, 0] * lam["target"]) ** 2) + penalty

    def outer(w, lam, x):
        return jnp.mean((predict(w, x) - x[:, 1]) ** 2) + lam["l2"] ** 2

    w = {"in": {"a": draw.normal(size=(3, 2))}, "out": draw.normal(size=2), "order": np.arange(2)}
    w, lam = jax.tree.map(jnp.asarray, (w, {"l2": -1.0, "target": 0.7}))
    dynamics = from_optax(train, optax.sgd(0.05, momentum=0.9))
    return Task(BilevelProblem(dynamics, outer), w, lam, InOrder(x), InOrder(v))


CASES = [ridge_adam, outer_lam, tree]
EVERY_CASE = pytest.mark.parametrize("problem_at", CASES, ids=lambda p: p.__name__)


# -- dense matrices of a problem --------------------------------------------------------------


class Dense(NamedTuple):
    """The raveled derivatives at one state and one pair of batches."""

    g: jax.Array  # grad_w L_tr
    g_lam: jax.Array  # grad_lam L_tr
    H: jax.Array
    M: jax.Array
    alpha: jax.Array
    direct: jax.Array


def weights(params):
    return ravel_pytree(split(params)[0])[0]


def with_weights(inner, flat):
    floating, rest = split(inner.params)
    return inner._replace(params=merge(ravel_pytree(floating)[1](flat), rest))


@partial(jax.jit, static_argnums=0)
def dense(problem, inner, lam, batch):
    lam, unravel = ravel_pytree(lam)

    def train(w, lam):
        params = with_weights(inner, w).params
        return problem.dynamics.parts.train_loss(params, unravel(lam), batch.train)

    def outer(w, lam):
        return problem.outer_loss(with_weights(inner, w).params, unravel(lam), batch.val)

    w = weights(inner.params)
    g, g_lam = jax.grad(train, argnums=(0, 1))(w, lam)
    H, M = jax.jacrev(jax.grad(train), argnums=(0, 1))(w, lam)
    return Dense(g, g_lam, H, M, *jax.grad(outer, argnums=(0, 1))(w, lam))


def drawn(like, seed):
    """Random numbers in the shape of a tree's floating leaves."""
    flat, unravel = ravel_pytree(like)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.shape)))


def compiled(estimator, problem):
    return jax.jit(partial(estimator.estimate, problem))


def close(tree, flat, rtol=TOLERANCE):
    assert_trees_close(ravel_pytree(tree)[0], jnp.ravel(flat), rtol)


def far(tree, flat):
    assert relative_error(ravel_pytree(tree)[0], flat) > 1e-3


# -- one update is its formula ----------------------------------------------------------------


@EVERY_CASE
def test_soba_is_its_formula(problem_at):
    problem, inner, lam, window = started(problem_at, T)
    rates = lambda t: 0.3 * (t + 1.0) ** -0.5  # noqa: E731
    estimator = soba(rates)
    u = drawn(split(inner.params)[0], seed=1)
    memory = estimator.init(inner, lam, None)._replace(u=u)
    u = ravel_pytree(u)[0]
    estimate = compiled(estimator, problem)
    for t in range(T):
        batch = at(window, t)
        d = dense(problem, inner, lam, batch)
        got = estimate(memory, inner, lam, jax.tree.map(lambda x: x[None], batch))
        close(got.hypergrad, d.direct - u @ d.M)
        close(got.memory.u, u - rates(t) * (u @ d.H - d.alpha))
        close(
            got.info["linear_residual"],
            jnp.linalg.norm(u @ d.H - d.alpha) / jnp.linalg.norm(d.alpha),
        )
        close(got.info["stationarity"], jnp.linalg.norm(d.g))
        assert_trees_close(
            weights(got.inner.params),
            weights(problem.dynamics.step(inner, lam, batch.train).params),
            TOLERANCE,
        )
        # Controls: the paper's sign of u, a forgotten M, a rate that does not decay.
        far(got.hypergrad, d.direct + u @ d.M)
        far(got.hypergrad, d.direct)
        far(got.memory.u, u - rates(t) * (u @ d.H + d.alpha))
        if t:
            far(got.memory.u, u - rates(0) * (u @ d.H - d.alpha))
        memory, inner, u = got.memory, got.inner, ravel_pytree(got.memory.u)[0]


@EVERY_CASE
def test_amigo_is_its_formula(problem_at):
    """With more steps on u than batches: they are used again from the first."""
    problem, inner, lam, window = started(problem_at, T)
    estimator = amigo(T, u_steps=5, step_size=0.3)
    u = drawn(split(inner.params)[0], seed=2)
    memory = estimator.init(inner, lam, None)._replace(u=u)
    got = compiled(estimator, problem)(memory, inner, lam, window)
    for t in range(T):
        inner = problem.dynamics.step(inner, lam, at(window.train, t))
    ds = [dense(problem, inner, lam, at(window, t)) for t in range(T)]
    u = ravel_pytree(u)[0]
    for j in range(5):
        u = u - 0.3 * (u @ ds[j % T].H - ds[-1].alpha)
    close(got.memory.u, u)
    close(got.hypergrad, ds[-1].direct - u @ ds[-1].M)
    far(got.hypergrad, ds[-1].direct + u @ ds[-1].M)
    assert_trees_close(weights(got.inner.params), weights(inner.params), TOLERANCE)


@pytest.mark.parametrize("problem_at, terms", [(outer_lam, 0), *((p, 4) for p in CASES)])
def test_stocbio_is_its_formula(problem_at, terms):
    problem, inner, lam, window = started(problem_at, T)
    a = 0.2
    got = compiled(stocbio(T, terms, a), problem)((), inner, lam, window)
    for t in range(T):
        inner = problem.dynamics.step(inner, lam, at(window.train, t))
    ds = [dense(problem, inner, lam, at(window, t)) for t in range(T)]
    eye = jnp.eye(len(ds[0].alpha))
    v = ds[-1].alpha
    series = [v]
    for j in range(terms):
        v = v @ (eye - a * ds[j % T].H)
        series.append(v)
    u = a * sum(series)
    close(got.hypergrad, ds[-1].direct - u @ ds[-1].M)
    far(got.hypergrad, ds[-1].direct - u @ ds[-1].M / a)  # a is part of the result
    if terms:
        far(got.hypergrad, ds[-1].direct - a * sum(series[:-1]) @ ds[-1].M)


@EVERY_CASE
def test_f2sa_is_its_formula(problem_at):
    problem, inner, lam, window = started(problem_at, T)
    kappa = lambda t: 2.0 + t  # noqa: E731
    estimator = f2sa(T, kappa)
    floating, _ = split(inner.params)
    memory = estimator.init(inner, lam, None)._replace(
        y=drawn(floating, seed=3), updates=jnp.array(1, jnp.int32)
    )
    got = compiled(estimator, problem)(memory, inner, lam, window)

    z, y = inner, with_weights(inner, ravel_pytree(memory.y)[0])
    make_optimizer = problem.dynamics.parts.make_optimizer
    unravel = ravel_pytree(floating)[1]
    for t in range(T):
        d = dense(problem, y, lam, at(window, t))
        w, rest = split(y.params)
        updates, slots = make_optimizer(lam).update(unravel(d.g + d.alpha / 3), y.opt_state, w)
        y = y._replace(params=merge(optax.apply_updates(w, updates), rest), opt_state=slots)
        z = problem.dynamics.step(z, lam, at(window.train, t))
    at_y, at_z = (dense(problem, x, lam, at(window, T - 1)) for x in (y, z))
    close(got.hypergrad, at_y.direct + 3 * (at_y.g_lam - at_z.g_lam))
    far(got.hypergrad, at_y.direct - 3 * (at_y.g_lam - at_z.g_lam))
    close(got.memory.y, weights(y.params))
    assert_trees_close(weights(got.inner.params), weights(z.params), TOLERANCE)
    close(got.info["distance"], jnp.linalg.norm(weights(y.params) - weights(z.params)))
    want = problem.outer_loss(z.params, lam, at(window.val, T - 1))
    close(got.info["val_loss"], want)
    assert float(got.info["penalty"]) == 3.0 and int(got.memory.updates) == 2


# -- a problem in closed form, and its partition ----------------------------------------------


def train_loss(w, lam, part):
    return jnp.mean((part["x"] @ w) ** 2) / 2 - w @ (jnp.mean(part["y"]) + lam)


def val_loss(w, lam, part):
    return jnp.mean((part["x"] @ (w - 1.0)) ** 2) / 2 + jnp.sum(lam**2) / 20


def quadratic(n, dimension, samples, seed=0):
    """`n` parts of `samples` Gaussian examples: L_tr and L_val are quadratic in w."""
    draw = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(draw.normal(size=(n, samples, dimension))),
        "y": jnp.asarray(draw.normal(size=(n, samples))),
        "index": jnp.arange(n),
    }


def whole(parts):
    """All parts as one batch."""
    x = parts["x"]
    return {"x": x.reshape(-1, x.shape[-1]), "y": parts["y"].reshape(-1)}


def at_minimum(train, val, lam):
    """(w*, u, h) of equation (9), from matrices."""
    H, V = (b["x"].T @ b["x"] / len(b["x"]) for b in (train, val))
    w = jnp.linalg.solve(H, jnp.mean(train["y"]) + lam)
    u = jnp.linalg.solve(H, V @ (w - 1.0))
    return w, u, lam / 10 + u  # M = -I


def of_parts(train, val, dimension, rate=0.2):
    """Problem, a start, and zeros for lam."""
    problem = BilevelProblem(from_optax(train_loss, optax.sgd(rate)), val_loss)
    lam = jnp.zeros(dimension)
    return problem, problem.dynamics.init(jnp.ones(dimension), lam), lam


def repeated(train, val, steps):
    return jax.tree.map(lambda x: jnp.repeat(x[None], steps, 0), Window(train, val))


def test_f2sa_has_the_two_rates_of_the_paper():
    """Algorithm 1 of Kwon et al. with SGD: gamma of z, alpha_k of y."""
    P, steps, gamma = 4, 2, 0.2
    train, val = quadratic(3, P, 8), quadratic(2, P, 8, seed=1)
    problem, state, lam = of_parts(train, val, P, gamma)
    estimator = f2sa(steps, lambda k: 2.0 + k, lambda k: 3.0 / (k + 2.0))
    estimate, memory = compiled(estimator, problem), estimator.init(state, lam, None)
    y = z = np.ones(P)

    def derivatives(w, t):
        return dense(problem, InnerState(w, state.opt_state), lam, at(window, t))

    for k in range(3):
        window = Window(at(train, np.array([k, 0])), at(val, np.array([1, 0])))
        kappa = 2.0 + k
        alpha = 3.0 / (k + 2.0) * gamma / kappa
        for t in range(steps):
            at_y, at_z = derivatives(y, t), derivatives(z, t)
            z, y = z - gamma * at_z.g, y - alpha * (at_y.alpha + kappa * at_y.g)
        at_y, at_z = derivatives(y, -1), derivatives(z, -1)
        got = estimate(memory, state, lam, window)
        close(got.memory.y, y)
        close(got.inner.params, z)
        close(got.hypergrad, at_y.direct + kappa * (at_y.g_lam - at_z.g_lam), 1e-11)
        memory, state, lam = got.memory, got.inner, lam - 0.1 * got.hypergrad


def test_saba_is_its_formula():
    """Fifteen steps over 3 and 2 parts, tables and means written out in NumPy."""
    train, val, n, m, P = quadratic(3, 4, 8), quadratic(2, 4, 8, seed=1), 3, 2, 4
    problem, inner, lam = of_parts(train, val, P)
    estimator = saba(n, m, 0.25)
    memory = estimator.init(inner, lam, None)
    estimate = compiled(estimator, problem)
    sizes = {"g": n, "uH": n, "uM": n, "alpha": m, "direct": m}
    table = {k: np.zeros((parts, P)) for k, parts in sizes.items()}
    seen = {k: [] for k in sizes}
    draw = np.random.default_rng(5)
    w, u, lam = np.ones(P), np.zeros(P), np.asarray(lam)
    for _ in range(15):
        i, j = draw.integers(n), draw.integers(m)
        batch = Window(at(train, i), at(val, j))
        d = dense(problem, InnerState(jnp.asarray(w), inner.opt_state), jnp.asarray(lam), batch)
        new = {"g": d.g, "uH": u @ d.H, "uM": u @ d.M, "alpha": d.alpha, "direct": d.direct}
        used = {}
        for k, x in new.items():
            at_k = i if sizes[k] == n else j
            known = table[k][seen[k]]
            mean = known.mean(0) if len(known) else 0.0
            used[k] = x - table[k][at_k] + mean if at_k in seen[k] else x
            table[k][at_k] = x
            seen[k] = sorted({at_k, *seen[k]})
        got = estimate(memory, inner, jnp.asarray(lam), jax.tree.map(lambda x: x[None], batch))
        h = used["direct"] - used["uM"]
        w, u = w - 0.2 * used["g"], u - 0.25 * (used["uH"] - used["alpha"])
        close(got.hypergrad, h, 1e-11)  # of rounding in the running mean
        close(got.inner.params, w, 1e-11)
        close(got.memory.u, u, 1e-11)
        memory, inner, lam = got.memory, got.inner, lam - 0.1 * h
    for mine, k in zip(got.memory.train.parts, ("g", "uH", "uM"), strict=True):
        assert_trees_close(mine, table[k], 1e-11)
    assert_trees_close(got.memory.val.mean[0], table["alpha"].mean(0), 1e-11)
    far(got.hypergrad, new["direct"] - new["uM"])  # control: no average


def test_saba_of_one_part_is_soba():
    train, val = quadratic(1, 4, 8), quadratic(1, 4, 8, seed=1)
    problem, inner, lam = of_parts(train, val, 4)
    window = Window(train, val)
    runs = []
    for estimator in (soba(0.2), saba(1, 1, 0.2)):
        state = init_state(problem, estimator, optax.sgd(0.1), inner.params, lam)
        step = jax.jit(partial(bilevel_step(estimator, optax.sgd(0.1)), problem))
        for _ in range(5):
            state = step(state, window)
        runs.append((state.params, state.hyperparams, state.memory.u))
    assert_trees_close(*runs, 1e-12)


# -- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator, updates",
    [(soba(0.2), 400), (amigo(10, 10, 0.2), 40), (stocbio(10, 200, 0.2), 40)],
    ids=["soba", "amigo", "stocbio"],
)
def test_converges_to_the_implicit_hypergradient(estimator, updates):
    """On a deterministic quadratic, lam fixed: u and h of (9) to 1e-8."""
    train, val = whole(quadratic(1, 5, 40)), whole(quadratic(1, 5, 40, seed=1))
    problem, inner, lam = of_parts(train, val, 5)
    w, u, h = at_minimum(train, val, lam)
    window = repeated(train, val, estimator.unroll_steps)
    memory = estimator.init(inner, lam, window)
    estimate = compiled(estimator, problem)
    for _ in range(updates):
        got = estimate(memory, inner, lam, window)
        memory, inner = got.memory, got.inner
    assert_trees_close(inner.params, w, 1e-8)
    if memory != ():
        assert_trees_close(memory.u, u, 1e-8)
        assert relative_error(memory.u, -u) > 1
    assert_trees_close(got.hypergrad, h, 1e-8)
    assert got.info["linear_residual"] < 1e-8 and got.info["stationarity"] < 1e-8


def f2sa_errors(kappas):
    train, val = whole(quadratic(1, 5, 40)), whole(quadratic(1, 5, 40, seed=1))
    problem, inner, lam = of_parts(train, val, 5)
    _, _, h = at_minimum(train, val, lam)
    window = repeated(train, val, 600)
    for kappa in kappas:
        estimator = f2sa(600, kappa)
        memory = estimator.init(inner, lam, window)
        got = compiled(estimator, problem)(memory, inner, lam, window)
        assert got.info["stationarity"] < 1e-12
        yield jnp.linalg.norm(got.hypergrad - h)


def test_f2sa_has_a_bias_of_one_over_the_penalty():
    """Error times kappa is constant within 5 % over kappa = 1e2..1e4; below, it is not."""
    kappas = np.array([1.0, 1e2, 1e3, 1e4])
    scaled = kappas * np.array([float(e) for e in f2sa_errors(kappas)])
    assert scaled[1:].max() / scaled[1:].min() < 1.05
    assert scaled[0] < 0.9 * scaled[1]


def test_saba_converges_at_constant_steps_and_soba_does_not():
    """100 dimensions, 960 of 1000 samples in 15 batches of 64, 1500 outer steps."""
    P, n = 100, 1000 // 64
    train, val = quadratic(n, P, 64), quadratic(n, P, 64, seed=1)
    rate = 0.1
    problem, inner, lam = of_parts(train, val, P, rate)
    norm = jax.jit(lambda lam: jnp.sum(at_minimum(whole(train), whole(val), lam)[2] ** 2))
    draws = np.random.default_rng(0).integers(0, n, (1500, 2))

    def fall(estimator):
        state = init_state(problem, estimator, optax.sgd(0.01), inner.params, lam)
        step = bilevel_step(estimator, optax.sgd(0.01))

        def body(state, draw):
            return step(problem, state, Window(at(train, draw[:1]), at(val, draw[1:]))), None

        state, _ = jax.jit(partial(jax.lax.scan, body))(state, draws)
        return float(norm(lam) / norm(state.hyperparams))

    assert fall(saba(n, n, rate)) > 1e6
    assert fall(soba(rate)) < 1e3


# -- machinery --------------------------------------------------------------------------------

EVERY = {
    "soba": lambda **own: soba(lambda t: 0.1 * (t + 1.0) ** -0.5),
    "saba": lambda **own: saba(3, 2),
    "amigo": lambda **own: amigo(2, 3, **own),
    "stocbio": lambda **own: stocbio(2, 3, **own),
    "f2sa": lambda **own: f2sa(2, **own),
}
EVERY_METHOD = pytest.mark.parametrize("name", EVERY)


def small(dtype, optimizer=None):
    """A problem with optimizer slots, and a window of four pairs of parts."""
    train, val = (
        jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float64 else x, parts)
        for parts in (quadratic(3, 4, 8), quadratic(2, 4, 8, seed=1))
    )
    optimizer = optimizer or optax.adam(0.1, eps_root=1e-8)
    problem = BilevelProblem(from_optax(train_loss, optimizer), val_loss)
    window = Window(at(train, np.array([0, 2, 1, 0])), at(val, np.array([1, 0, 1, 1])))
    return problem, jnp.ones(4, dtype), jnp.zeros(4, dtype), window


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@EVERY_METHOD
def test_scan_equals_a_loop(name):
    problem, w, lam, window = small(jnp.float64)
    estimator, outer = EVERY[name](), optax.sgd(0.1)
    first = init_state(problem, estimator, outer, w, lam)
    step = jax.jit(partial(bilevel_step(estimator, outer), problem))
    state = start_episode(estimator, problem, first, keep_phi=False).state
    for t in range(0, 4, estimator.unroll_steps):
        state = step(state, at(window, slice(t, t + estimator.unroll_steps)))
    scanned = jax.jit(partial(run_episode, estimator, outer, problem))(first, window)
    for field in ("params", "hyperparams", "memory"):
        assert_trees_close(getattr(scanned, field), getattr(state, field), 1e-12)
    assert int(state.metadata["n_rejected"]) == 0
    assert all(np.isfinite(state.metadata[k]) for k in estimator.metrics)


@EVERY_METHOD
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_structure_and_dtypes_are_final_from_the_start(name, dtype):
    problem, w, lam, window = small(dtype)
    estimator, outer = EVERY[name](), optax.sgd(0.1)
    step = partial(bilevel_step(estimator, outer), problem)
    first = jax.eval_shape(lambda: init_state(problem, estimator, outer, w, lam))
    begun = jax.eval_shape(
        lambda s: start_episode(estimator, problem, s, keep_phi=False).state, first
    )
    after = jax.eval_shape(step, begun, at(window, slice(estimator.unroll_steps)))
    assert avals(first) == avals(begun) == avals(after)
    floating = jax.tree.leaves(split((after.memory, after.params, after.hyperparams))[0])
    assert {x.dtype for x in floating} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", ["amigo", "stocbio", "f2sa"])
def test_loops_agree(name):
    problem, w, lam, window = small(jnp.float64)
    inner = problem.dynamics.init(w, lam)
    window = at(window, slice(2))
    found = []
    for loop in ("scan", "unroll", "host"):
        estimator = EVERY[name](loop=loop)
        memory = estimator.init(inner, lam, window)
        run = (
            estimator.estimate if loop == "host" else jax.jit(estimator.estimate, static_argnums=0)
        )
        found.append(run(problem, memory, inner, lam, window).hypergrad)
    assert_trees_close(found[0], found[1], 1e-12)
    assert_trees_close(found[0], found[2], 1e-12)


@EVERY_METHOD
def test_warm_starts_outlive_an_episode(name):
    """Slots are fresh, params may have moved; u, y, tables and counts stay."""
    problem, w, lam, window = small(jnp.float64)
    estimator = EVERY[name]()
    state = init_state(problem, estimator, optax.sgd(0.1), w, lam)
    run = jax.jit(partial(run_episode, estimator, optax.sgd(0.1), problem))
    ended = run(state, window)
    begun = start_episode(estimator, problem, ended.update(params=w)).state
    kept = begun.memory
    if name == "f2sa":
        assert_trees_close(kept.slots, problem.dynamics.init(w, lam).opt_state, 0.0)
        assert relative_error(ended.memory.slots[0].mu, jnp.zeros(4)) > 0
        kept = kept._replace(slots=ended.memory.slots)
    assert_trees_close(kept, ended.memory, 0.0)


@EVERY_METHOD
def test_hyperparameters_of_the_optimizer_are_refused(name):
    problem, inner, lam, window = started(learning_rates, 1)
    estimator = EVERY[name]()
    window = jax.tree.map(lambda x: jnp.repeat(x, estimator.unroll_steps, 0), window)
    memory = estimator.init(inner, lam, window)
    with pytest.raises(ValueError, match=f"{name} cannot tune the leaf the value itself.*one_step"):
        jax.eval_shape(partial(estimator.estimate, problem), memory, inner, lam, window)


@pytest.mark.parametrize("name", ["saba", "f2sa"])
def test_an_opaque_step_is_refused_where_the_method_needs_its_gradient(name):
    problem, w, lam, window = small(jnp.float64)
    dynamics = problem.dynamics._replace(parts=None)
    problem = problem._replace(dynamics=dynamics, train_loss=train_loss)
    inner, estimator = problem.dynamics.init(w, lam), EVERY[name]()
    with pytest.raises(ValueError, match=f"{name} sends a gradient.*inner_optimizer="):
        jax.eval_shape(
            partial(estimator.estimate, problem),
            estimator.init(inner, lam, None), inner, lam, at(window, slice(estimator.unroll_steps)),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["soba", "amigo", "stocbio"])
def test_an_opaque_step_does_where_the_training_loss_is_given(name):
    problem, w, lam, window = small(jnp.float64)
    hidden = problem._replace(dynamics=problem.dynamics._replace(parts=None), train_loss=train_loss)
    inner, estimator = problem.dynamics.init(w, lam), EVERY[name]()
    window = at(window, slice(estimator.unroll_steps))
    memory = estimator.init(inner, lam, None)
    results = [compiled(estimator, p)(memory, inner, lam, window) for p in (problem, hidden)]
    assert_trees_close(results[0].hypergrad, results[1].hypergrad, 1e-12)
    with pytest.raises(ValueError, match=f"{name} differentiates the training loss"):
        estimator.estimate(hidden._replace(train_loss=None), memory, inner, lam, window)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_part_outside_the_table_moves_nothing(index):
    problem, w, lam, window = small(jnp.float64)
    estimator = EVERY["saba"]()
    step = jax.jit(partial(bilevel_step(estimator, optax.sgd(0.1)), problem))
    window = at(window, slice(1))
    before = step(init_state(problem, estimator, optax.sgd(0.1), w, lam), window)
    window.train["index"] = jnp.array([index])
    after = step(before, window)
    assert int(after.metadata["status"]) == Status.NONFINITE_TRAIN_STATE
    kept = [(s.params, s.hyperparams, s.memory) for s in (before, after)]
    assert_trees_close(*kept, 0.0)


@pytest.mark.parametrize(
    "batch, message",
    [
        (lambda b: {k: b[k] for k in "xy"}, "which part it is"),
        (lambda b: tuple(b.values()), "which part it is"),
        (lambda b: {**b, "index": b["index"] * 1.0}, "one integer"),
        (lambda b: {**b, "index": jnp.stack([b["index"]] * 2, 1)}, "one integer"),
    ],
)
def test_a_batch_that_does_not_say_its_part_is_refused(batch, message):
    problem, w, lam, window = small(jnp.float64)
    window = at(window, slice(1))
    dynamics = from_optax(lambda w, lam, b: jnp.sum((w - lam) ** 2), optax.sgd(0.1))
    estimator, inner, window = EVERY["saba"](), dynamics.init(w, lam), at(window, slice(1))
    with pytest.raises(ValueError, match=message):
        estimator.estimate(
            BilevelProblem(dynamics, lambda w, lam, b: jnp.sum(w**2)),
            estimator.init(inner, lam, None), inner, lam, Window(batch(window.train), window.val),
        )  # fmt: skip


# -- classes ----------------------------------------------------------------------------------

CLASSES = {
    SOBAOptimizer: {},
    SABAOptimizer: {"train_batches": 3, "val_batches": 2},
    AmIGOOptimizer: {"unroll_steps": 2},
    StocBiOOptimizer: {"unroll_steps": 2},
    F2SAOptimizer: {"unroll_steps": 2, "penalty": 10.0, "y_scale": 0.5},
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_classes_run_and_reduce_the_validation_loss(cls):
    train, val = quadratic(3, 4, 8), quadratic(2, 4, 8, seed=1)
    parts = [
        iter([jax.tree.map(lambda x: x[i % len(p["x"])], p) for i in range(200)])  # noqa: B023
        for p in (train, val)
    ]
    opt = cls(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.02), **CLASSES[cls])
    assert hash(opt) == hash(cls(**{f: getattr(opt, f) for f in opt.__dataclass_fields__}))
    state = opt.run(
        opt.init(jnp.ones(4), jnp.zeros(4)), M=5, T=40,
        get_train_batch=parts[0].__next__, get_val_batch=parts[1].__next__,
        train_loss_fn=train_loss, val_loss_fn=val_loss,
    )  # fmt: skip

    def value(lam):
        w, _, _ = at_minimum(whole(train), whole(val), lam)
        return float(val_loss(w, lam, whole(val)))

    assert value(state.hyperparams) < 0.8 * value(jnp.zeros(4))
    assert np.isfinite(state.get_metric("stationarity"))


@pytest.mark.parametrize(
    "cls, settings, error, message",
    [
        (SOBAOptimizer, {"step_size": 0.0}, ValueError, "step_size must be positive"),
        (SOBAOptimizer, {"step_size": "a"}, TypeError, "step_size must be a number"),
        (SABAOptimizer, {}, ValueError, "needs train_batches="),
        (SABAOptimizer, {"train_batches": 2}, ValueError, "needs val_batches="),
        (SABAOptimizer, {"train_batches": 2, "val_batches": 2, "index": 1}, TypeError, "index"),
        (AmIGOOptimizer, {"u_steps": 0}, ValueError, "u_steps must be at least 1"),
        (AmIGOOptimizer, {"T": 25}, ValueError, "multiple of the 10 steps"),
        (StocBiOOptimizer, {"terms": -1}, ValueError, "terms must be at least 0"),
        (F2SAOptimizer, {"penalty": -1.0}, ValueError, "penalty must be positive"),
        (F2SAOptimizer, {"y_scale": 0.0}, ValueError, "y_scale must be positive"),
    ],
)
def test_settings_are_checked(cls, settings, error, message):
    with pytest.raises(error, match=message):
        cls(inner_optimizer=optax.sgd(0.1), **settings)


@pytest.mark.parametrize("cls", [SABAOptimizer, F2SAOptimizer])
def test_an_update_fn_is_refused_at_construction(cls):
    with pytest.raises(ValueError, match="inner_optimizer="):
        cls(update_fn=lambda w, lam, batch: w, **CLASSES[cls])


# -- the study --------------------------------------------------------------------------------


def made_up(n=600, P=5):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(3 * n, P)).astype(np.float32)
    labels = (x @ draw.normal(size=P) + draw.normal(size=3 * n) > 0).astype(np.int32)
    parts = [DataBatch(x[i * n : (i + 1) * n], labels[i * n : (i + 1) * n]) for i in range(3)]
    return Dataset("made_up", parts[0], parts[2], 2, validation=parts[1])


def test_the_exact_hypergradient_of_the_study():
    """Against central differences of the re-solved problem."""
    data, lam, h = split_data(made_up()), np.linspace(-3, 1, 5), 1e-4
    found = exact(data, lam)
    want = [
        (exact(data, lam + h * e).value - exact(data, lam - h * e).value) / (2 * h)
        for e in np.eye(5)
    ]
    np.testing.assert_allclose(found.hypergrad, want, rtol=1e-6, atol=1e-10)


def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(study.datasets, "load", lambda name, data_dir: made_up())
    monkeypatch.setitem(study.RATES, "ijcnn1", {"soba": (0.2, 1.0), "saba": (0.2, 1.0)})
    lines = []
    config = study.Config(out=tmp_path, seeds=2, budget=4000, method=("soba", "saba"))
    result = study.run(config, lines.append)
    assert [path.name for path in write(result, tmp_path)] == [
        "result.json", "curves.csv", "points.csv", "hypergradient.png", "validation.png"
    ]  # fmt: skip
    assert len(lines) == 4 and result.methods["soba"].gradient_evaluations == 2000
    rows = (tmp_path / "points.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * (study.POINTS + 1)
    for name in ("soba", "saba"):
        values = result.methods[name].metrics["val_loss"].seeds
        assert (values < result.methods["fixed"].metrics["val_loss"].seeds).all()


@pytest.mark.parametrize("method", ["soba", "saba"])
def test_one_bad_validation_batch_is_forgotten(method):
    """u and the tables of a step whose validation loss is not finite are not kept."""

    def loss(w, lam, batch):
        return jnp.sum(jnp.exp(lam) * w**2) / 2 + jnp.sum((w - batch["x"]) ** 2) / 2

    def judge(w, lam, batch):
        return jnp.sum((w - batch["x"]) ** 2)

    if method == "soba":
        opt = SOBAOptimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), T=4)
    else:
        rates = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1)}
        opt = SABAOptimizer(train_batches=2, val_batches=2, T=4, **rates)
    state = opt.init(jnp.zeros(2), jnp.zeros(2))
    seen = []
    for t in range(5):
        train = {"x": jnp.ones(2), "index": jnp.asarray([t % 2])}
        val = {"x": jnp.full(2, jnp.nan if t == 2 else 1.0), "index": jnp.asarray([t % 2])}
        state = opt.step(state, train, val, loss, judge)
        seen.append(int(state.metadata["status"]))
    assert seen == [0, 0, Status.NONFINITE_VAL_LOSS, 0, 0]
    assert np.isfinite(state.memory.u).all()


def test_a_series_that_diverges_is_flagged():
    train, val = whole(quadratic(1, 5, 40)), whole(quadratic(1, 5, 40, seed=1))
    problem, inner, lam = of_parts(train, val, 5)
    window = repeated(train, val, 10)
    for rate, status in ((0.2, Status.OK), (50.0, Status.LINEAR_SOLVE_INACCURATE)):
        got = compiled(stocbio(10, 10, rate), problem)((), inner, lam, window)
        assert got.info["status"] == status
