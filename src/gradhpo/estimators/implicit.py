"""Implicit differentiation (IFT, AID, HOAG): the hypergradient of where training ends.

At a minimum, `grad_w L_train(w, lam) = 0` defines w(lam), whatever path led there:

    h = dL_val/dlam - u M,    u H = alpha

with H the Hessian and M the mixed derivative of the training loss, alpha = dL_val/dw.
Bengio (2000), Pedregosa (2016), Lorraine et al. (2020). In the fixed-point form, for
s = Phi(s, lam), it is h = dL_val/dlam + u B, u (I - A) = alpha: the same for gradient
descent at any rate. In general, for c(w, lam) = 0, G = dc/dw and h = dL_val/dlam - u dc/dlam.

Nothing of the path is stored. Away from the minimum the error is about
||grad L_train|| / (smallest eigenvalue of H): that norm is reported as `stationarity`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.curvature import (
    Condition,
    check_reached,
    condition_of,
    curvature,
    custom_rules_of,
    training_loss,
)
from gradhpo.core.dynamics import InnerState, linearize, zero_cotangent
from gradhpo.core.estimator import (
    Cost,
    Estimate,
    Estimator,
    Loop,
    check_loop,
    report,
    roll,
    whole,
)
from gradhpo.core.inspect import unreached_hyperparams
from gradhpo.core.problem import BilevelProblem, Window, outer_gradients
from gradhpo.core.status import Status
from gradhpo.core.types import Hyper, Params
from gradhpo.solvers import Solution, Solver, cgls, gmres, minres
from gradhpo.solvers._system import NOISE, Coarse, rounding
from gradhpo.utils._partition import merge, scalar_dtype, split
from gradhpo.utils.gradients import tree_is_finite, tree_l2_norm, tree_last, tree_scale, tree_where
from gradhpo.utils.settings import check_callable, check_count, check_seed
from gradhpo.utils.validation import complain

__all__ = ["ImplicitMemory", "implicit"]

ACCURATE = 1e-2
"""Relative residual above which the status says that the linear system is not solved."""
ROUNDING = 8
"""So many units of rounding lie between the residual of u and the 1 that u = 0 leaves."""


class ImplicitMemory(NamedTuple):
    """What outlives an update."""

    u: Any  # the last solution, where the next solve starts
    key: jax.Array  # root key of solvers that draw; never consumed
    draws: jax.Array  # solves so far


class _System(NamedTuple):
    """`u G = alpha` at one state, and the term that its solution stands for."""

    product: Callable[[Any], Any]  # u -> u G
    indirect: Callable[[Any], Hyper]  # u -> -u dc/dlam
    defect: Any  # what vanishes where training ends
    symmetric: bool  # G is known to be symmetric


def implicit(
    unroll_steps: int = 1,
    solver: Solver | None = None,
    *,
    condition: str | Condition = "training_loss",
    warm_start: bool = True,
    seed: int = 0,
    loop: Loop = "scan",
) -> Estimator:
    """The derivative of the validation loss at the minimum of the training loss.

    Args:
        unroll_steps: Inner steps before every hypergradient; they bring w to the minimum, and a
            few are enough where the last update left it close by.
        solver: Of the linear system, from `gradhpo.solvers`. None is
            `minres()` for the training loss, right for a singular Hessian too. Where G need not be
            symmetric (other conditions, losses with custom gradients) it is `gmres()`, and
            `cgls()` if that finds no solution. Others: `cg`, `neumann`, `nystrom`, `identity`,
            `dense`, or your own.
        condition: What defines the end of training: "training_loss" (its gradient is
            zero), "fixed_point" (Phi(s) = s; an unsymmetric system: dense, neumann with
            step 1, or gmres), or a function `(w, lam, batch) -> tree like w` that is zero there.
        warm_start: Start the solver from the last solution (`cg` and `gmres`; the others start
            anew at every update).
        seed: Of solvers that draw.
        loop: How loops over steps run, see `gradhpo.core.estimator.fold`.

    H and M are those of the last train batch of the window: give large batches.

    Cost per outer update: the steps, two gradients, one product per iteration of the solver
    and two more (three for those that judge a start). Memory: the solver's. Narrow weights
    (bfloat16) are solved for in float32, to the accuracy that products with them have.

    Raises:
        ValueError: at the first call, for a hyperparameter that the minimum does not
            depend on (learning rates, momenta, schedules). With "fixed_point" a warning: a
            weight decay in the optimizer moves the fixed point, a learning rate does not,
            and nothing tells the two apart.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    if not callable(condition) and condition not in ("training_loss", "fixed_point"):
        raise ValueError(
            f"condition must be 'training_loss', 'fixed_point' or a function, got {condition!r}."
        )
    if solver is not None:
        check_callable("solver", solver, "of gradhpo.solvers, such as minres()")
    seed = check_seed(seed)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del lam, window
        zeros = zero_cotangent(inner)
        u = zeros if condition == "fixed_point" else zeros.params
        return ImplicitMemory(u, jax.random.key(seed), jnp.zeros((), jnp.int32))

    def system(problem, inner, lam, batch) -> _System:
        if condition == "fixed_point":
            _warn_of_rates(problem, inner, lam, batch)
            return _fixed_point(problem, inner, lam, batch.train)
        if callable(condition):
            check_reached(problem, condition, inner, lam, batch, "implicit differentiation")
            return _root(condition, inner, lam, batch.train)
        loss = training_loss(problem, "implicit differentiation")
        check_reached(
            problem, condition_of(loss, inner), inner, lam, batch, "implicit differentiation"
        )
        at = curvature(loss, inner, lam, batch.train)
        return _System(
            lambda u: at.products(u)[0],
            lambda u: tree_scale(-1, at.products(u)[1]),
            at.gradient,
            symmetric=not custom_rules_of(loss, inner, lam, batch.train),
        )

    def estimate(problem, memory, inner, lam, window):
        inner = roll(problem.dynamics, inner, lam, window.train, loop=loop)
        # Compiled by the identity of `differentiate`: the solvers make new functions at each call.
        found = whole(differentiate, loop)
        return Estimate(
            inner=inner, **found(problem, memory, inner, lam, Window(*tree_last(window)))
        )

    def differentiate(problem, memory, inner, lam, batch):
        """What an estimate holds besides the inner state."""
        loss, alpha, direct = outer_gradients(problem, inner, lam, batch.val)
        G = system(problem, inner, lam, batch)
        solve = solver or (minres() if G.symmetric else _unsymmetric)
        right = alpha if condition == "fixed_point" else alpha.params
        start = memory.u if warm_start else optax.tree.zeros_like(memory.u)
        key = jax.random.fold_in(memory.key, memory.draws)
        product, (wide, start) = _widened(G.product, right), _wide((right, start))
        found = solve(product, wide, start, key, loop)
        u = _cast_like(found.u, right)
        indirect = G.indirect(u)  # -u M
        usable = _usable(found)
        hypergrad = jax.tree.map(
            lambda a, b: jnp.where(usable, a + b, jnp.nan).astype(a.dtype), direct, indirect
        )
        stationarity = tree_l2_norm(G.defect)
        posed = jnp.isfinite(stationarity) & tree_is_finite(wide)
        info = report(
            loss,
            direct,
            indirect,
            # NaN in what the system is made of is left to the finite guard.
            status=jnp.where(
                usable | posed,
                _status(found, check_curvature=G.symmetric),
                Status.NONFINITE_HYPERGRAD,
            ).astype(jnp.int32),
            stationarity=stationarity,
            linear_residual=found.residual,
            linear_iterations=found.iterations.astype(scalar_dtype(lam)),
            curvature=found.curvature,
        )
        memory = memory._replace(
            u=tree_where(usable, u, memory.u), draws=optax.safe_increment(memory.draws)
        )
        return {"hypergrad": hypergrad, "memory": memory, "info": info}

    metrics = ("stationarity", "linear_residual", "linear_iterations", "curvature")
    # Where the system is known to be symmetric; elsewhere `_unsymmetric` has no one limit.
    used = solver or (minres() if condition == "training_loss" else _unsymmetric)
    checks = getattr(used, "checks", 1)  # a solver of the user's own judges its answer, like ours
    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        hosted=loop == "host",
        metrics=metrics,
        price=lambda size: Cost(unroll_steps + 2, checks + 1),
        iterations=getattr(used, "iterations", math.inf),
    )


def _unsymmetric(product, alpha, start, key, loop) -> Solution:
    """`gmres`, which needs fewer products where there is a solution; else least squares."""
    found = gmres()(product, alpha, start, key, loop)

    def least_squares():
        other = cgls()(product, alpha, start, key, loop)
        return other._replace(iterations=found.iterations + other.iterations)

    found = found._replace(least_squares=jnp.asarray(found.least_squares))
    return lax.cond(found.residual <= ACCURATE, lambda: found, least_squares)


def _usable(found: Solution) -> jax.Array:
    """Whether u is better than none; in the least-squares sense none may be the best there is."""
    residual = jnp.asarray(found.residual)
    within = ROUNDING * jnp.finfo(residual.dtype).eps
    best = jnp.asarray(found.least_squares) & (residual <= 1 + within)
    return (residual < 1 - within) | best  # False for NaN


def _status(found: Solution, check_curvature: bool) -> jax.Array:
    """What to say of a solution; only a minimum, where the curvature counts, needs it positive."""
    unsolved = jnp.where(
        found.least_squares, Status.SINGULAR_SYSTEM, Status.LINEAR_SOLVE_INACCURATE
    )
    status = jnp.where(found.residual <= ACCURATE, Status.OK, unsolved)
    if check_curvature:
        status = jnp.where(found.curvature < 0, Status.NEGATIVE_CURVATURE, status)
    return jnp.where(_usable(found), status, Status.LINEAR_SOLVE_FAILED)


def _warn_of_rates(problem: BilevelProblem, inner: InnerState, lam: Hyper, batch: Window) -> None:
    parts = problem.dynamics.parts
    loss = problem.train_loss if parts is None else parts.train_loss
    if loss is None:
        return
    names = unreached_hyperparams(problem, condition_of(loss, inner), inner, lam, batch)
    if names:
        complain(
            f"implicit differentiation of a fixed point: the leaf {', '.join(names)} acts through "
            "the optimizer alone. Right for a weight decay there; a learning rate or a momentum "
            "does not move the fixed point: what is computed for it is zero there, and "
            "away from it an artefact.",
            strict=False,
        )


def _wide(tree: Any) -> Any:
    """No leaf narrower than float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _widened(product: Callable[[Any], Any], like: Any) -> Callable[[Any], Any]:
    """`product` on wide vectors; inside they have the dtypes of the weights.

    Sums of narrow numbers are kept in float32, so that the product is wrong by one rounding of the
    result, and not by the NOISE of them that sums leave.
    """
    return Coarse(lambda u: _wide(product(_cast_like(u, like))), rounding(like) / NOISE)


def _fixed_point(problem, inner: InnerState, lam: Hyper, batch) -> _System:
    """`G = I - A` and `-dc/dlam = B`, over weights and slots."""
    new, pullback = linearize(problem.dynamics, inner, lam, batch)
    after, before = (split((s.params, s.opt_state))[0] for s in (new, inner))
    return _System(
        lambda u: optax.tree.sub(u, pullback(u)[0]),
        lambda u: pullback(u)[1],
        optax.tree.sub(after, before),
        symmetric=False,
    )


def _root(condition: Condition, inner: InnerState, lam: Hyper, batch) -> _System:
    """`G = dc/dw` of a user's own condition."""
    w, rest = split(inner.params)

    def c(w: Params, lam: Hyper):
        return split(condition(merge(w, rest), lam, batch))[0]

    defect, pullback = jax.vjp(c, w, lam)
    return _System(
        lambda u: pullback(u)[0],
        lambda u: tree_scale(-1, pullback(u)[1]),
        defect,
        symmetric=False,
    )
