"""The discounted sum: the true alpha_T, and powers of gamma for the state Jacobians.

Lee et al. (2022), "Online Hyperparameter Meta-Learning with Hypergradient Distillation", eq. (7),
from which HyperDistill is derived. Over a window of T steps, with B_t = dPhi/dlam at s_{t-1}:

    h = dL_val(w_T, lam; V_T)/dlam + sum_{t=1}^{T} gamma^{T-t} alpha_T B_t
        + gamma^T alpha_T ds_0/dlam

Exact when A_t = gamma I, for any validation loss. With gamma = 1 and initial weights as the
hyperparameters, s_0 = lam, it is first-order MAML (Finn et al. 2017, section 5.2):
`h = dL_val(w_T)/dw`.

alpha_T is known only at the end, so the B_t are taken at states that were kept, or at points of
DrMAD's line between the first and the last one.
"""

import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import join, linearize
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, fold, report, whole
from gradhpo.core.start import pull_start
from gradhpo.estimators._line import walk
from gradhpo.utils.gradients import tree_lerp, tree_scale
from gradhpo.utils.settings import check_choice, check_count, check_fraction, unless_traced

__all__ = ["discounted_sum"]


def discounted_sum(
    gamma: float = 0.99, unroll_steps: int = 10, *, points: str = "trajectory", loop: Loop = "scan"
) -> Estimator:
    """Reverse mode in which a discount stands for every product with a state Jacobian.

    Args:
        gamma: Discount in [0, 1]; 0 leaves the last term alone, that of the one-step method.
        unroll_steps: Horizon T.
        points: "trajectory" keeps the T states; "line" takes B_t at the points of the straight
            line from s_0 to s_T, as DrMAD does, and keeps two.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: T training gradients forwards; T gradients and mixed products back; one
    validation gradient.
    """
    gamma = unless_traced(check_fraction, "gamma", gamma)
    unroll_steps = check_count("unroll_steps", unroll_steps)
    points = check_choice("points", points, ("trajectory", "line"))
    loop = check_loop(loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def accumulate(problem, consts, acc, x):
        lam, (first, last), alpha = consts
        beta, batch, (rest, model_state, kept) = x
        point = tree_lerp(first, last, beta) if kept is None else kept
        _, pullback = linearize(problem.dynamics, join(point, rest, model_state), lam, batch)
        _, term = pullback(alpha)  # alpha_T B_t
        return optax.tree.add(tree_scale(gamma, acc), term), None

    def total(problem, origin, lam, loss, direct, indirect, alpha):
        distant = tree_scale(jnp.asarray(gamma) ** unroll_steps, alpha)
        indirect = optax.tree.add(indirect, pull_start(problem, origin, lam, distant))
        return optax.tree.add(direct, indirect), report(loss, direct, indirect)

    def estimate(problem, memory, inner, lam, window, origin=None):
        line = walk(problem, inner, lam, window, points=points, loop=loop)
        consts, zeros = (lam, line.ends, line.alpha), optax.tree.zeros_like(lam)
        indirect, _ = fold(accumulate, problem, consts, zeros, line.xs, loop=loop)
        terms = (line.direct, indirect, line.alpha)
        hypergrad, info = whole(total, loop)(problem, origin, lam, line.val_loss, *terms)
        return Estimate(hypergrad, line.inner, memory, info)

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        hosted=loop == "host",
        starts=True,
        price=lambda size: Cost(2 * unroll_steps + 1, unroll_steps),
    )
