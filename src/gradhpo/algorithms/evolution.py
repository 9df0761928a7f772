"""Hypergradients without derivatives: evolution strategies."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.evolution import es, pes

__all__ = ["ESOptimizer", "PESOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESOptimizer(EstimatorOptimizer):
    """Antithetic evolution strategies: values of the validation loss after T steps.

    Args:
        T: Inner steps per hypergradient; required.
        sigma: Standard deviation of the perturbations, in the units of the hyperparameters.
        pairs: Antithetic pairs per hypergradient; each trains twice.
        seed: Of the perturbations.

    Source:
        Salimans et al. (2017). See `gradhpo.estimators.evolution`.

    >>> opt = ESOptimizer(update_fn=lambda w, lam, batch: w - lam * batch, T=2, sigma=0.1)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> estimate = opt.compute_hypergradient(state, 2.0, 2.0, judge, judge)  # exact: 24
    >>> bool(20 < estimate < 28)
    True
    """

    sigma: float = 0.01
    pairs: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.T is None:
            raise ValueError("ESOptimizer needs T=, the number of inner steps it looks through.")
        self.estimator()  # refuses bad settings

    def estimator(self, loop: Loop = "scan") -> Estimator:
        assert self.T is not None
        return es(self.T, sigma=self.sigma, pairs=self.pairs, seed=self.seed, loop=loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PESOptimizer(EstimatorOptimizer):
    """Persistent evolution strategies: short windows without the bias of truncation.

    Args:
        unroll_steps: Inner steps K per hypergradient; an episode of T has T / K.
        sigma, pairs, seed: As for `ESOptimizer`.

    Source:
        Vicol et al. (2021), algorithm 2. See `gradhpo.estimators.evolution`.
    """

    unroll_steps: int = 10
    sigma: float = 0.01
    pairs: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator()  # refuses bad settings

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return pes(self.unroll_steps, sigma=self.sigma, pairs=self.pairs, seed=self.seed, loop=loop)
