"""Full reverse mode (RMD, back-propagation through training): the exact hypergradient.

Maclaurin et al. (2015), Franceschi et al. (2017). Forwards s_t = Phi(s_{t-1}, lam; D_t) with
every state kept; then alpha_T = dL_val/ds_T, h = dL_val/dlam, and for t = T..1

    h <- h + alpha_t B_t,    alpha_{t-1} = alpha_t A_t
"""

import optax

from gradhpo.core.dynamics import linearize
from gradhpo.core.estimator import Estimate, Estimator, Loop, fold, report
from gradhpo.core.problem import outer_gradients
from gradhpo.utils.gradients import tree_last

__all__ = ["reverse"]


def reverse(steps: int, *, loop: Loop = "scan") -> Estimator:
    """The derivative of the validation loss after `steps` inner steps.

    Args:
        steps: Horizon T. The hypergradient is exact for the whole window; what happened
            before it is a constant.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: T training gradients forwards; T gradients and second-order
    products backwards; one validation gradient. Memory: T states.
    """

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def forward(problem, lam, inner, batch):
        return problem.dynamics.step(inner, lam, batch), inner  # s_t, keeping s_{t-1}

    def backward(problem, lam, carry, x):
        alpha, acc = carry
        inner, batch = x
        _, pullback = linearize(problem.dynamics, inner, lam, batch)
        alpha, term = pullback(alpha)  # alpha_{t-1} = alpha_t A_t, alpha_t B_t
        return (alpha, optax.tree.add(acc, term)), None

    def estimate(problem, memory, inner, lam, window):
        inner, states = fold(forward, problem, lam, inner, window.train, loop=loop)
        loss, alpha, direct = outer_gradients(problem, inner, lam, tree_last(window.val))
        carry = (alpha, optax.tree.zeros_like(lam))
        xs = (states, window.train)
        (_, indirect), _ = fold(backward, problem, lam, carry, xs, loop=loop, reverse=True)
        hypergrad = optax.tree.add(direct, indirect)
        return Estimate(hypergrad, inner, memory, report(loss, direct, indirect))

    return Estimator(init, estimate, window=steps)
