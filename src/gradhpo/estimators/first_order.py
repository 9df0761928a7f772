"""First-order hypergradient (FO; DARTS first order, xi = 0).

    h_t = dL_val(w_t, lam; V_t) / dlam        (w_t held fixed)

Exact when the weights do not react to the hyperparameters. Identically zero for
everything that acts through training alone: learning rates, weight decay, data weights.
"""

from gradhpo.core.estimator import Cost, Estimate, Estimator, report
from gradhpo.core.problem import outer_gradients
from gradhpo.utils.gradients import tree_last

__all__ = ["first_order"]


def first_order() -> Estimator:
    """The direct term alone: one inner step and one validation gradient per update.

    Source:
        Liu et al. (2019), "DARTS", section 2.3 with xi = 0.
    """

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def estimate(problem, memory, inner, lam, window):
        batch = tree_last(window)
        inner = problem.dynamics.step(inner, lam, batch.train)  # s_t
        loss, _, direct = outer_gradients(problem, inner, lam, batch.val)
        return Estimate(direct, inner, memory, report(loss, direct))

    return Estimator(init, estimate, indirect=False, price=lambda size: Cost(2, 0))
