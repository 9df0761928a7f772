"""The discounted sum of Lee et al. (2022), eq. (7)."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.discounted_sum import discounted_sum

__all__ = ["ENTRIES", "DiscountedSumOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscountedSumOptimizer(EstimatorOptimizer):
    """Reverse mode with a discount for every state Jacobian: `sum_t gamma^(T-t) alpha_T B_t`.

    Args:
        T: Inner steps per hypergradient; required.
        gamma: Discount in [0, 1]. 1 with `begin=gradhpo.meta.learned(...)` is first-order MAML.
        points: "trajectory" (T states) or "line" (two).

    Source:
        Lee et al. (2022), eq. (7). See `gradhpo.estimators.discounted_sum`.

    >>> step = lambda w, lam, batch: w - lam * (w - batch)
    >>> opt = DiscountedSumOptimizer(update_fn=step, gamma=0.5, T=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    -0.5
    """

    gamma: float = 0.99
    points: str = "trajectory"

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return discounted_sum(self.gamma, self.horizon, points=self.points, loop=loop)


ENTRIES = (
    Method(
        "discounted_sum",
        DiscountedSumOptimizer,
        discounted_sum,
        "reverse mode with a discount for every state Jacobian",
        Example(
            problems=("outer_lam",),
            exact_on=("contraction_nonlinear",),
            not_exact_on=("outer_lam", "integer_leaves", "initial_scale"),
            settings={"gamma": 0.8, "T": 3},
        ),
        Summary(
            "discounted sum",
            "discounted_sum",
            "everything in the window, forgetting at one rate",
            "$T S$; on the line 2 $S$",
            r"$A_t = \gamma I$",
            "first-order MAML; the reference that HyperDistill distils",
        ),
    ),
)
