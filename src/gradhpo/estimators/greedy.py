"""Generalized greedy hypergradient: discounted one-step terms along a window.

"Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025).
Over a window of T steps, with alpha_t = dL_val/ds_t at step t:

    h = dL_val(w_T, lam; V_T)/dlam + sum_{t=1}^{T} gamma^{T-t} alpha_t B_t

accumulated forwards, acc <- gamma acc + alpha_t B_t, so no trajectory is stored. Exact
when A_t = gamma I and L_val is linear in w; gamma = 0 is the one-step method.
"""

import optax

from gradhpo.core.dynamics import linearize
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, fold, report
from gradhpo.core.problem import outer_gradients
from gradhpo.utils.gradients import tree_scale
from gradhpo.utils.settings import check_count, check_fraction, unless_traced

__all__ = ["greedy"]


def greedy(gamma: float = 0.9, unroll_steps: int = 5, *, loop: Loop = "scan") -> Estimator:
    """Horizon `unroll_steps` at the memory of one step.

    Args:
        gamma: Discount in [0, 1]; 0.9 was uniformly good in the paper.
        unroll_steps: Inner steps T per outer update.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: T times (training gradient + validation gradient + mixed
    product). The norm of h grows like 1 + gamma + ... + gamma^(T-1): compare methods by
    direction or with their own outer rates, not at one shared rate.
    """
    gamma = unless_traced(check_fraction, "gamma", gamma)
    unroll_steps = check_count("unroll_steps", unroll_steps)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def body(problem, lam, carry, batch):
        inner, acc, _ = carry
        inner, pullback = linearize(problem.dynamics, inner, lam, batch.train)
        loss, alpha, direct = outer_gradients(problem, inner, lam, batch.val)
        _, indirect = pullback(alpha)  # alpha_t B_t
        acc = optax.tree.add(tree_scale(gamma, acc), indirect)
        return (inner, acc, direct), loss

    def estimate(problem, memory, inner, lam, window):
        zeros = optax.tree.zeros_like(lam)
        carry = (inner, zeros, zeros)
        (inner, acc, direct), losses = fold(body, problem, lam, carry, window, loop=loop)
        hypergrad = optax.tree.add(direct, acc)
        return Estimate(hypergrad, inner, memory, report(losses[-1], direct, acc))

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        hosted=loop == "host",
        price=lambda size: Cost(2 * unroll_steps, unroll_steps),
    )
