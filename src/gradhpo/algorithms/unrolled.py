"""Exact hypergradients through the unrolled training run."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.reverse import reverse

__all__ = ["ReverseOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseOptimizer(EstimatorOptimizer):
    """Full reverse mode: one exact hypergradient per episode of T steps, from T stored states.

    `step` has one batch and repeats it for all T steps; `run` draws one for every step.

    Args:
        T: Inner steps per hypergradient; required.

    Source:
        Franceschi et al. (2017), algorithm 1. See `gradhpo.estimators.reverse`.

    >>> opt = ReverseOptimizer(update_fn=lambda w, lam, batch: w - lam * (w - batch), T=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    -0.5
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.T is None:
            raise ValueError(
                "ReverseOptimizer needs T=, the number of inner steps it differentiates through."
            )

    def estimator(self, loop: Loop = "scan") -> Estimator:
        assert self.T is not None
        return reverse(self.T, loop=loop)
