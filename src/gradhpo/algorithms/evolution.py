"""Hypergradients without derivatives: evolution strategies."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.evolution import es, pes

__all__ = ["ENTRIES", "ESOptimizer", "PESOptimizer"]


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

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return es(self.horizon, sigma=self.sigma, pairs=self.pairs, seed=self.seed, loop=loop)


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

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return pes(self.unroll_steps, sigma=self.sigma, pairs=self.pairs, seed=self.seed, loop=loop)


_EVOLUTION = Summary(
    "evolution",
    "evolution",
    "a smoothed loss's derivative",
    "32 $S$",
    "unbiased, for the smoothed loss",
    "chaotic or non-differentiable training; a check",
)

ENTRIES = (
    Method(
        "es",
        ESOptimizer,
        es,
        "evolution strategies over T steps, 16 antithetic pairs",
        Example(
            problems=("contraction",),
            not_exact_on=("outer_lam",),
            settings={"T": 2, "pairs": 2},
            of_class={"pairs": 2, "sigma": 0.3},
        ),
        _EVOLUTION,
        usual=True,
    ),
    Method(
        "pes",
        PESOptimizer,
        pes,
        "persistent evolution strategies, 16 pairs, windows of 10",
        Example(
            problems=("contraction",),
            not_exact_on=("outer_lam",),
            settings={"unroll_steps": 2, "pairs": 2},
            of_class={"unroll_steps": 2, "pairs": 2, "sigma": 0.3},
        ),
        _EVOLUTION,
        most_unroll_steps=10,
    ),
)
