"""Generalized greedy hypergradients."""

import dataclasses
import math

from gradhpo.algorithms._windowed import WindowedOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.step import OuterOptimizer
from gradhpo.estimators.greedy import greedy
from gradhpo.transforms.top_k import top_k

__all__ = ["ENTRIES", "GreedyOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyOptimizer(WindowedOptimizer):
    """Discounted one-step terms summed over a window: `sum_t gamma^(T-t) alpha_t B_t`.

    `run` draws a batch for every inner step (the paper's setting) and updates the
    hyperparameters once per `unroll_steps`; `step` has one batch and repeats it.

    Args:
        unroll_steps: Inner steps per outer update.
        gamma: Discount in [0, 1]; 0 is the one-step method.
        top_k: Move only the hyperparameters of largest hypergradient, so many of them or such a
            fraction; short for `gradhpo.transforms.top_k(outer_optimizer, k)`, which has more
            settings and goes with every method.
        T: Inner steps per episode, a multiple of `unroll_steps` and by default equal to it.

    Source:
        "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR
        2025). See `gradhpo.estimators.greedy`.

    >>> opt = GreedyOptimizer(update_fn=lambda w, lam, batch: w - lam * (w - batch), unroll_steps=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    -1.15
    """

    unroll_steps: int = 5
    gamma: float = 0.9
    top_k: int | float | None = None

    @property
    def outer(self) -> OuterOptimizer:
        return (
            self.outer_optimizer if self.top_k is None else top_k(self.outer_optimizer, self.top_k)
        )

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return greedy(self.gamma, self.unroll_steps, loop=loop)


ENTRIES = (
    Method(
        "greedy",
        GreedyOptimizer,
        greedy,
        "generalized greedy: discounted one-step terms",
        Example(
            problems=("outer_lam",),
            exact_on=("contraction",),
            not_exact_on=("contraction_nonlinear",),
            settings={"gamma": 0.8, "unroll_steps": 3},
            of_class={"unroll_steps": 2},
        ),
        Summary(
            "greedy",
            "greedy",
            "discounted one-step terms of a window",
            "$P$",
            r"$A_t = \gamma I$, validation loss linear in $w$",
            "a longer horizon with no stored trajectory",
        ),
        most_unroll_steps=math.inf,
        usual=True,
    ),
)
