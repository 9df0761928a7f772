"""StocBiO: a few steps on the weights, then a Neumann series with a fresh batch per product.

Ji et al. (2021), "Bilevel optimization: convergence analysis and enhanced design",
algorithm 2 with eq. (5). Per update, with a training batch D_t for every step:

    w   <- Phi(w, lam; D_t)                     t = 1..T
    alpha, dL_val/dlam                          at w_T, from one validation batch
    v_0  = alpha,   v_j = v_{j-1} - a v_{j-1} H(D_j)       j = 1..K, H of L_tr at w_T
    u    = a (v_0 + v_1 + ... + v_K)
    h    = dL_val/dlam - u M

Only w is warm-started. u is alpha (I - (I - a H)^(K+1)) H^-1 for one H, so it is short by
what the series leaves out: for a below 1 over the largest eigenvalue of H the error is at
most (1 - a m)^(K+1) / m times alpha, m the smallest eigenvalue. The batches D_j and the one
of M are those of the window again; the paper draws fresh ones.
"""

import jax.numpy as jnp
import optax

from gradhpo.core.curvature import check_reached, condition_of, curvature, training_loss
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, fold, report, roll
from gradhpo.core.problem import outer_gradients
from gradhpo.core.status import Status
from gradhpo.estimators._apply import guarded, relative_norm
from gradhpo.estimators.amigo import cycle
from gradhpo.solvers.neumann import DIVERGED
from gradhpo.utils.gradients import tree_l2_norm, tree_last, tree_scale
from gradhpo.utils.settings import check_count, check_positive, unless_traced

__all__ = ["stocbio"]


def stocbio(
    unroll_steps: int = 10, terms: int = 10, step_size: float = 0.1, *, loop: Loop = "scan"
) -> Estimator:
    """Hypergradients of the minimum by a truncated series; nothing to remember.

    Args:
        unroll_steps: Inner steps T per update.
        terms: K, the products of the series, which has K + 1 terms; 0 is u = a alpha.
        step_size: a, at most 1 over the largest eigenvalue of H: beyond 2 over it the
            series diverges.
        loop: How both loops run, see `gradhpo.core.estimator.fold`.

    Cost per update: T training gradients, one validation gradient, K + 1 products. Memory:
    none between updates.

    `info`: `stationarity` is ||grad_w L_tr|| and `linear_residual` is ||u H - alpha|| /
    ||alpha||, on the last training batch. A last term ten times alpha is reported as status
    LINEAR_SOLVE_INACCURATE: the series diverges.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    terms = check_count("terms", terms, minimum=0)
    step_size = unless_traced(check_positive, "step_size", step_size)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def body(problem, consts, carry, batch):
        inner, lam = consts
        v, total = carry
        loss = training_loss(problem, "stocbio")
        v_hessian, _ = curvature(loss, inner, lam, batch).products(v)
        v = optax.tree.sub(v, tree_scale(step_size, v_hessian))
        return (v, optax.tree.add(total, v)), None

    def estimate(problem, memory, inner, lam, window):
        last = tree_last(window)
        loss = training_loss(problem, "stocbio")
        check_reached(problem, condition_of(loss, inner), inner, lam, last, "stocbio")
        inner = roll(problem.dynamics, inner, lam, window.train, loop=loop)  # w_T
        val_loss, alpha, direct = outer_gradients(problem, inner, lam, last.val)
        alpha = alpha.params
        v = total = alpha
        if terms:
            batches = cycle(window.train, terms)
            (v, total), _ = fold(body, problem, (inner, lam), (v, total), batches, loop=loop)
        u = tree_scale(step_size, total)
        converges = relative_norm(v, alpha) < DIVERGED  # False for NaN too

        train = curvature(loss, inner, lam, last.train)
        u_hessian, u_mixed = train.products(u)
        indirect = tree_scale(-1, u_mixed)
        residual = relative_norm(optax.tree.sub(u_hessian, alpha), alpha)
        info = report(
            val_loss,
            direct,
            indirect,
            status=jnp.where(converges, Status.OK, Status.LINEAR_SOLVE_INACCURATE),
            stationarity=tree_l2_norm(train.gradient),
            linear_residual=residual,
        )
        hypergrad = guarded(optax.tree.add(direct, indirect), u)
        return Estimate(hypergrad, inner, memory, info)

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        metrics=("stationarity", "linear_residual"),
        price=lambda size: Cost(unroll_steps + 1, terms + 1),
    )
