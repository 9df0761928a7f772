"""Every method by name: what studies, the command line and the tests choose from.

An entry put into `METHODS` is known to all of them from then on.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.evolution import ESOptimizer, PESOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.implicit import ImplicitOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.single_loop import (
    AmIGOOptimizer,
    F2SAOptimizer,
    SABAOptimizer,
    SOBAOptimizer,
    StocBiOOptimizer,
)
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import (
    DrMADOptimizer,
    FDSOptimizer,
    ForwardOptimizer,
    ReverseOptimizer,
    ReversibleOptimizer,
)
from gradhpo.core.estimator import Estimator
from gradhpo.solvers import cg, identity, neumann, nystrom

__all__ = ["METHODS", "Cost", "Method"]

Cost = tuple[float, float]
"""Gradient evaluations (training and validation alike) and second-order products."""


PIECE = 10
"""Inner steps per window that methods have which go through a run in several."""


def _no_fit(steps: int) -> Cost:
    return 0, 0


def _every_step(gradients: float, products: float) -> Callable[..., Cost]:
    return lambda steps, size, window=1: (gradients * steps, products * steps)


class Method(NamedTuple):
    """A method, what its name settles, and its price."""

    optimizer: type[EstimatorOptimizer]
    description: str
    cost: Callable[..., Cost]
    # `cost(T, H, window)`: of T inner steps with H hyperparameters, at most; `window` steps to an
    # outer update, by default those of the optimizer's default settings
    settings: Mapping[str, Any] = MappingProxyType({})
    iterations: int = 0  # of the linear solver, at most; a product each, and part of the cost
    longest_window: float = 0  # what `unroll_steps` may be in a run of T; 0: leave it alone
    needs: tuple[str, ...] = ()  # settings that have to fit the problem
    fit: Callable[[int], Cost] = _no_fit  # `fit(T)`: cost of `Estimator.start` on T steps

    def make(self, **settings: Any) -> EstimatorOptimizer:
        """The method's optimizer with these settings and those of its name."""
        return self.optimizer(**{**self.settings, **settings})

    def over(self, T: int, **settings: Any) -> EstimatorOptimizer:
        """As `make`, for a run of T inner steps in the fewest windows it may take."""
        if self.longest_window:
            longest = int(min(T, self.longest_window))
            settings = {
                "unroll_steps": max(k for k in range(1, longest + 1) if T % k == 0),
                **settings,
            }
        return self.make(T=T, **settings)

    def estimator(self, T: int) -> Estimator:
        """The estimator as in `over`, for a problem that has its own training step."""
        return self.over(T, inner_optimizer=optax.identity()).estimator()

    def episode_cost(self, T: int, size: int, window: int, iterations: float | None = None) -> Cost:
        """Cost of an episode of T steps with `size` hyperparameters, the fit before it included.

        Args:
            iterations: Of the linear solver, as the run counted them; None: the most it may take.
        """
        gradients, products = self.cost(T, size, window)
        more_gradients, more_products = self.fit(T)
        if iterations is not None:
            more_products += iterations - self.iterations
        return gradients + more_gradients, products + more_products


def _implicit(description: str, solver: Any, iterations: int, more: int = 2) -> Method:
    """T steps, one validation gradient, the gradient of the condition, and the solve."""
    return Method(
        ImplicitOptimizer,
        f"implicit differentiation, {description}",
        lambda steps, size, window=None: (steps + 2, iterations + more),
        MappingProxyType({"solver": solver}),
        iterations,
    )


METHODS: dict[str, Method] = {
    "fo": Method(FOOptimizer, "first-order: the direct term alone", _every_step(2, 0)),
    "one_step": Method(OneStepOptimizer, "exact one-step lookahead", _every_step(2, 1)),
    "t1t2": Method(
        T1T2Optimizer,
        "one-step lookahead, by DARTS differences for Optax optimizers",
        _every_step(4, 0),
    ),
    "greedy": Method(
        GreedyOptimizer,
        "generalized greedy: discounted one-step terms",
        _every_step(2, 1),
        longest_window=math.inf,
    ),
    "hyperdistill": Method(
        OnlineHypergradientOptimizer,
        "HyperDistill: online hypergradient distillation",
        _every_step(2, 1),
        # theta: T + 1 gradients forwards, T gradients and 2T products on the way back
        fit=lambda steps: (2 * steps + 1, 2 * steps),
    ),
    "reverse": Method(
        ReverseOptimizer,
        "reverse mode: exact, T stored states",
        lambda steps, size, window=None: (2 * steps + 1, steps),
    ),
    "reversible": Method(
        ReversibleOptimizer,
        "reverse mode, SGD with momentum run backwards: exact, bits stored",
        lambda steps, size, window=None: (3 * steps + 1, steps),
    ),
    "forward": Method(
        ForwardOptimizer,
        "forward mode: exact, one product per hyperparameter",
        lambda steps, size, window=None: (steps + 1, steps * size),
    ),
    "rtho": Method(
        ForwardOptimizer,
        "forward mode while the hyperparameters move (RTHO)",
        lambda steps, size, window=1: (2 * steps, steps * size),
        MappingProxyType({"online": True}),
    ),
    "fds": Method(
        FDSOptimizer,
        "forward mode for schedules, one value per piece (FDS)",
        lambda steps, size, window=None: (steps + 1, steps * size),
        needs=("pieces",),
    ),
    "drmad": Method(
        DrMADOptimizer,
        "reverse mode along a straight line, two stored states",
        lambda steps, size, window=None: (2 * steps + 1, steps),
    ),
    "implicit_cg": _implicit("conjugate gradients", cg(), 100, more=3),
    "implicit_neumann": _implicit("20 Neumann iterations", neumann(), 20),
    "implicit_nystrom": _implicit("Nystrom approximation of rank 10", nystrom(), 10),
    "implicit_identity": _implicit("curvature ignored", identity(0.1), 0),
    "es": Method(
        ESOptimizer,
        "evolution strategies over T steps, 16 antithetic pairs",
        lambda steps, size, window=None: (33 * (steps + 1), 0),
    ),
    "pes": Method(
        PESOptimizer,
        "persistent evolution strategies, 16 pairs, windows of 10",
        lambda steps, size, window=PIECE: (33 * (steps + steps // window), 0),
        longest_window=PIECE,
    ),
    "soba": Method(
        SOBAOptimizer,
        "single loop: weights, linear system and hyperparameters, a step each",
        _every_step(2, 1),
    ),
    "saba": Method(
        SABAOptimizer,
        "SOBA with SAGA averages",
        _every_step(2, 1),
        needs=("train_batches", "val_batches"),
    ),
    "amigo": Method(
        AmIGOOptimizer,
        "ten inner steps, ten steps on the linear system, warm-started",
        lambda steps, size, window=PIECE: (steps + steps / window, 11 * steps / window),
        longest_window=PIECE,
    ),
    "stocbio": Method(
        StocBiOOptimizer,
        "ten inner steps, Neumann series with a batch per term",
        lambda steps, size, window=PIECE: (steps + steps / window, 11 * steps / window),
        longest_window=PIECE,
    ),
    "f2sa": Method(
        F2SAOptimizer,
        "penalty method, first-order derivatives alone",
        lambda steps, size, window=PIECE: (3 * steps + 3 * steps / window, 0),
        longest_window=PIECE,
    ),
}
