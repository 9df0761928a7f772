"""SOBA: weights, linear system and hyperparameters moved together, one batch each.

Dagréou et al. (2022), "A framework for bilevel optimization that enables stochastic and
global variance reduction algorithms", algorithm 1 with the directions (5). All three at the
same point (w, u, lam), with one batch D of training and one batch V of validation:

    D_w   = grad_w L_tr(w, lam; D)                        w   <- Phi(w, lam; D)
    D_u   = u H - alpha                                   u   <- u - rho_t D_u
    D_lam = dL_val/dlam - u M                             h    = D_lam

with H and M the Hessian and the mixed derivative of L_tr, alpha = dL_val/dw. Our u solves
u H = alpha; the paper's v is -u. The paper moves w and u at one rate and all three at
rates proportional to t^(-1/2); here w moves by the inner optimizer, u by `step_size`.

Exact at the fixed point: with w at the minimum of L_tr and u H = alpha, h is the
hypergradient through that minimum. Before, it lags behind by as much as w and u do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.curvature import check_reached, condition_of, curvature, training_loss
from gradhpo.core.estimator import Cost, Estimate, Estimator, report
from gradhpo.core.problem import outer_gradients
from gradhpo.core.types import Params
from gradhpo.estimators._apply import guarded, left, relative_norm
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_l2_norm, tree_last, tree_scale
from gradhpo.utils.schedules import Schedule, check_schedule, value_at

__all__ = ["SobaMemory", "soba"]


class SobaMemory(NamedTuple):
    """What SOBA carries; all of it survives an episode."""

    u: Params  # tends to alpha H^-1; over the floating leaves of w, None elsewhere
    updates: jax.Array  # so far, for the schedule


def soba(step_size: Schedule = 0.1) -> Estimator:
    """Hypergradients of the minimum, from one product per step.

    Args:
        step_size: rho of u, below 2 over the largest eigenvalue of H: a number, or a
            function of the count of updates such as `lambda t: 0.1 * (t + 1.0) ** -0.5`.
            The rates of w and lam are those of the inner and the outer optimizer.

    Cost per update: one training gradient, one validation gradient, one Hessian and mixed
    product. Memory: u, as large as the weights.

    `info`: `stationarity` is ||D_w||, `linear_residual` is ||D_u|| / ||alpha||, both of this
    batch; `val_loss` is that of the weights before the step.
    """
    step_size = check_schedule("step_size", step_size)

    def init(inner, lam, window):
        del lam, window
        u, _ = split(inner.params)
        return SobaMemory(optax.tree.zeros_like(u), jnp.zeros((), jnp.int32))

    def estimate(problem, memory, inner, lam, window):
        batch = tree_last(window)
        loss = training_loss(problem, "soba")
        check_reached(problem, condition_of(loss, inner), inner, lam, batch, "soba")
        train = curvature(loss, inner, lam, batch.train)
        u_hessian, u_mixed = train.products(memory.u)
        val_loss, alpha, direct = outer_gradients(problem, inner, lam, batch.val)

        d_u = optax.tree.sub(u_hessian, alpha.params)
        indirect = tree_scale(-1, u_mixed)
        rho = value_at(step_size, memory.updates)
        u = optax.tree.sub(memory.u, tree_scale(rho, d_u))
        inner = problem.dynamics.step(inner, lam, batch.train)  # along D_w
        residual = relative_norm(d_u, alpha.params)
        info = report(
            val_loss,
            direct,
            indirect,
            status=left(residual, memory.u, u),
            stationarity=tree_l2_norm(train.gradient),
            linear_residual=residual,
        )
        hypergrad = guarded(optax.tree.add(direct, indirect), u)
        memory = SobaMemory(u, jnp.asarray(optax.safe_increment(memory.updates)))
        return Estimate(hypergrad, inner, memory, info)

    return Estimator(
        init,
        estimate,
        metrics=("stationarity", "linear_residual"),
        price=lambda size: Cost(2, 1),
    )
