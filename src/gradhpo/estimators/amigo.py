"""AmIGO: a few steps on the weights, a few on the linear system, both warm-started.

Arbel and Mairal (2022), "Amortized implicit differentiation for stochastic bilevel
optimization", algorithm 1. Per update, with a training batch D_t for every step:

    w   <- Phi(w, lam; D_t)                     t = 1..T
    alpha, dL_val/dlam                          at w_T, from one validation batch
    u   <- u - rho (u H(D_j) - alpha)           j = 1..N, H of L_tr at w_T
    h    = dL_val/dlam - u M

Our u solves u H = alpha; the paper's z is -u. It survives from update to update. The
batches D_j and the one of M are those of the window again; the paper draws fresh ones.

Exact in the limit of many steps: u tends to alpha H^-1 and h to the hypergradient through
the minimum that w tends to.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax

from gradhpo.core.curvature import check_reached, condition_of, curvature, training_loss
from gradhpo.core.estimator import (
    Cost,
    Estimate,
    Estimator,
    Loop,
    check_loop,
    count_steps,
    fold,
    report,
    roll,
)
from gradhpo.core.problem import outer_gradients
from gradhpo.core.types import Batch, Params
from gradhpo.estimators._apply import guarded, left, relative_norm
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_l2_norm, tree_last, tree_scale
from gradhpo.utils.settings import check_count, check_positive, unless_traced

__all__ = ["AmigoMemory", "amigo", "cycle"]


class AmigoMemory(NamedTuple):
    """What AmIGO carries; it survives an episode."""

    u: Params  # tends to alpha H^-1; over the floating leaves of w, None elsewhere


def amigo(
    unroll_steps: int = 10, u_steps: int = 10, step_size: float = 0.1, *, loop: Loop = "scan"
) -> Estimator:
    """Hypergradients of the minimum, with inner problem and linear system solved by halves.

    Args:
        unroll_steps: Inner steps T per update.
        u_steps: Steps N on u per update.
        step_size: rho of u, below 2 over the largest eigenvalue of H.
        loop: How both loops run, see `gradhpo.core.estimator.fold`.

    Cost per update: T training gradients, one validation gradient, N + 1 products. Memory:
    u, as large as the weights.

    `info`: `stationarity` is ||grad_w L_tr|| and `linear_residual` is ||u H - alpha|| /
    ||alpha||, after the last step of either, on the last training batch.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    u_steps = check_count("u_steps", u_steps)
    step_size = unless_traced(check_positive, "step_size", step_size)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del lam, window
        return AmigoMemory(optax.tree.zeros_like(split(inner.params)[0]))

    def body(problem, consts, u, batch):
        inner, lam, alpha = consts
        loss = training_loss(problem, "amigo")
        u_hessian, _ = curvature(loss, inner, lam, batch).products(u)
        d_u = optax.tree.sub(u_hessian, alpha)
        return optax.tree.sub(u, tree_scale(step_size, d_u)), None

    def estimate(problem, memory, inner, lam, window):
        last = tree_last(window)
        loss = training_loss(problem, "amigo")
        check_reached(problem, condition_of(loss, inner), inner, lam, last, "amigo")
        inner = roll(problem.dynamics, inner, lam, window.train, loop=loop)  # w_T
        val_loss, alpha, direct = outer_gradients(problem, inner, lam, last.val)
        alpha = alpha.params
        consts = (inner, lam, alpha)
        u, _ = fold(body, problem, consts, memory.u, cycle(window.train, u_steps), loop=loop)

        train = curvature(loss, inner, lam, last.train)
        u_hessian, u_mixed = train.products(u)
        indirect = tree_scale(-1, u_mixed)
        residual = relative_norm(optax.tree.sub(u_hessian, alpha), alpha)
        info = report(
            val_loss,
            direct,
            indirect,
            status=left(residual, memory.u, u),
            stationarity=tree_l2_norm(train.gradient),
            linear_residual=residual,
        )
        hypergrad = guarded(optax.tree.add(direct, indirect), u)
        return Estimate(hypergrad, inner, AmigoMemory(u), info)

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        metrics=("stationarity", "linear_residual"),
        price=lambda size: Cost(unroll_steps + 1, u_steps + 1),
    )


def cycle(batches: Batch, n: int) -> Batch:
    """The first `n` batches of a stack that begins again when it ends.

    >>> print(cycle(np.array([10, 20, 30]), 5))
    [10 20 30 10 20]
    """
    steps = count_steps(batches)
    return batches if n == steps else jax.tree.map(lambda x: x[np.arange(n) % steps], batches)
