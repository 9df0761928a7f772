"""Faults 38 and 39: systems with NaN, singular and indefinite ones never count as solved."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Status,
    Window,
    amigo,
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
    saba,
    soba,
    stocbio,
)
from gradhpo.estimators.implicit import ACCURATE, _unsymmetric, _usable

SOLVERS = {
    "minres": minres(),
    "dense": dense(),
    "cg": cg(),
    "gmres": gmres(),
    "gmres, then cgls": _unsymmetric,
    "cgls": cgls(),
    "neumann": neumann(20, 0.3),
    "identity": identity(0.3),
    "nystrom": nystrom(4, 1e-2),
}
SIZE = 4
regular = np.diag([1.0, 2.0, 3.0, 2.5]) + 0.1
ones = np.ones(SIZE)


def at(array, index, value):
    array = array.copy()
    array[index] = value
    return array


SYSTEMS = {  # G, alpha
    "regular": (regular, ones),
    "NaN operator": (np.full((SIZE, SIZE), np.nan), ones),
    "one NaN in the operator": (at(regular, (1, 1), np.nan), ones),
    "infinite operator": (at(regular, (2, 2), np.inf), ones),
    "NaN right-hand side": (regular, at(ones, 0, np.nan)),
    "infinite right-hand side": (regular, at(ones, 3, np.inf)),
    "singular": (np.diag([1.0, 2.0, 0.0, 3.0]), ones),
    "flat": (np.zeros((SIZE, SIZE)), ones),
    "indefinite": (np.diag([2.0, -1.0, 1.5, -3.0]), ones),
}
NOT_FINITE = [name for name in SYSTEMS if "NaN" in name or "infinite" in name]


def solve(solver, G, b):
    return solver(lambda u: u @ G, b, jnp.zeros_like(b), jax.random.key(0), "scan")


@pytest.mark.parametrize("name", SOLVERS)
def test_38_39_no_solver_takes_a_bad_system_for_solved(name):
    """Under jit and vmap; what it says of the residual is what it is."""
    G, b = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*SYSTEMS.values(), strict=True))
    found = jax.jit(jax.vmap(partial(solve, SOLVERS[name])))(G, b)
    found = found._replace(least_squares=jnp.broadcast_to(found.least_squares, len(SYSTEMS)))
    usable = dict(zip(SYSTEMS, np.asarray(jax.vmap(_usable)(found)), strict=True))
    residual = dict(zip(SYSTEMS, np.asarray(found.residual), strict=True))
    least_squares = dict(zip(SYSTEMS, np.asarray(found.least_squares), strict=True))
    curvature = dict(zip(SYSTEMS, np.asarray(found.curvature), strict=True))
    assert usable["regular"]
    for system in NOT_FINITE:
        assert not residual[system] < 1 and not least_squares[system], system
        assert not usable[system], system
    if name != "nystrom":  # which solves a damped system, of which there is an answer
        for system in ("singular", "flat"):  # half of alpha, all of it, stands in the null space
            assert residual[system] >= 0.49, system
        assert usable["flat"] <= least_squares["flat"]
    left = np.linalg.norm(np.asarray(found.u)[-1] @ SYSTEMS["indefinite"][0] - ones) / 2
    if residual["indefinite"] <= ACCURATE:  # the answer to the system, at no minimum
        assert left <= 2 * ACCURATE
    if name not in ("gmres", "gmres, then cgls", "cgls", "identity"):
        assert curvature["indefinite"] < 0  # those four meet alpha and u alone


@pytest.mark.parametrize("name", SOLVERS)
def test_38_without_a_transformation_too(name):
    for system in ("NaN operator", "NaN right-hand side"):
        found = solve(SOLVERS[name], *(jnp.asarray(x, jnp.float32) for x in SYSTEMS[system]))
        assert not found.residual < 1 and not found.least_squares
        assert not _usable(found)


# -- updates -----------------------------------------------------------------------------------


def train_loss(w, lam, batch):
    """Around w = 0: `batch` is the diagonal of its Hessian, the last number makes that NaN."""
    bent = (batch[-1] * (jnp.sum(w**2) + lam["shift"] @ lam["shift"] + 1.0)) ** 1.5
    return batch[:SIZE] @ (w - lam["shift"]) ** 2 / 2 + 1e-3 * bent - 1e-3 * batch[-1] ** 1.5


def val_loss(w, lam, batch):
    return jnp.sum(w) + 0 * batch[0]


METHODS = {
    "implicit": implicit(1),
    "implicit, dense": implicit(1, dense()),
    "implicit, gmres": implicit(1, gmres()),
    "implicit, cgls": implicit(1, cgls()),
    "implicit, a condition": implicit(
        1, condition=lambda w, lam, batch: jax.grad(train_loss)(w, lam, batch)
    ),
    "implicit, a fixed point": implicit(1, condition="fixed_point"),
    "soba": soba(),
    "saba": saba(1, 1, index=lambda batch: jnp.zeros((), int)),
    "amigo": amigo(1, 10),
    "stocbio": stocbio(1, 40),
}


def updates(estimator, diagonal, bend, count=1):
    problem = BilevelProblem(from_optax(train_loss, optax.sgd(0.1)), val_loss)
    lam = {"shift": jnp.zeros(SIZE)}
    batch = jnp.array([[*diagonal, bend]], jnp.float32)
    window = Window(batch, batch)
    state = init_state(problem, estimator, optax.sgd(0.0), jnp.zeros(SIZE), lam, window)
    step = partial(bilevel_step(estimator, optax.sgd(0.0)), problem)
    return jax.lax.scan(lambda s, _: (step(s, window), None), state, length=count)[0]


@pytest.mark.parametrize("name", METHODS)
def test_38_39_no_method_takes_a_bad_system_for_solved(name):
    """NaN in the second derivatives alone; a saddle, for as many updates as u needs to run away.

    Single-loop methods follow their system and are OK on the way, with a residual that says how far
    they are; running away is told.
    """
    count = {"soba": 80, "saba": 80, "amigo": 8}.get(name, 1)
    run = jax.jit(jax.vmap(partial(updates, METHODS[name], count=count)))
    diagonals = jnp.array([[1.0, 2.0, 3.0, 2.5], [1.0, 2.0, 3.0, 2.5], [2.0, -1.0, 1.5, -3.0]])
    state = run(diagonals, jnp.array([1.0, 0.0, 1.0]))
    regular, bent, saddle = (Status(int(code)) for code in state.metadata["status"])
    assert regular in (Status.OK, Status.LINEAR_SOLVE_INACCURATE) and not regular.rejects
    assert bent.rejects, bent
    assert np.isfinite(state.hyperparams["shift"]).all()
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(getattr(state.memory, "u", ())))
    if name in ("implicit, gmres", "implicit, cgls", "implicit, a condition"):
        assert state.metadata["linear_residual"][2] < ACCURATE  # solved, and no claim of a minimum
    elif name != "implicit, a fixed point":
        assert saddle in (Status.NEGATIVE_CURVATURE, Status.LINEAR_SOLVE_INACCURATE), saddle


def test_39_damping_mends_what_a_saddle_is():
    """With more damping than the most negative curvature the system is positive definite."""
    run = jax.jit(partial(updates, implicit(1, minres(damping=4.0))))
    state = run(jnp.array([2.0, -1.0, 1.5, -3.0]), 1.0)
    assert state.metadata["status"] == Status.OK and float(state.metadata["curvature"]) > 0
