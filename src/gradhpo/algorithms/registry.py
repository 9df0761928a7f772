"""Every method by name: what studies, the command line and the tests choose from."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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
from gradhpo.estimators.linear_solvers import cg, identity, neumann, nystrom

__all__ = ["METHODS", "Cost", "Method"]

Cost = tuple[float, float]
"""Gradient evaluations (training and validation alike) and second-order products."""


def _every_step(gradients: float, products: float) -> Callable[[int, int], Cost]:
    return lambda steps, size: (gradients * steps, products * steps)


class Method(NamedTuple):
    """A method, what its name settles, and its price."""

    optimizer: type[EstimatorOptimizer]
    description: str
    cost: Callable[..., Cost]  # of T inner steps with H hyperparameters, at most
    settings: Mapping[str, Any] = MappingProxyType({})
    iterations: int = 0  # of the linear solver, at most; a product each, and part of the cost

    def make(self, **settings: Any) -> EstimatorOptimizer:
        """The method's optimizer with these settings and those of its name."""
        return self.optimizer(**{**self.settings, **settings})


def _implicit(description: str, solver: Any, iterations: int, more: int = 2) -> Method:
    """T steps, one validation gradient, the gradient of the condition, and the solve."""
    return Method(
        ImplicitOptimizer,
        f"implicit differentiation, {description}",
        lambda steps, size: (steps + 2, iterations + more),
        MappingProxyType({"solver": solver}),
        iterations,
    )


# HyperDistill's fits of theta come on top: T + 1 gradients, and T gradients and 2T products
# on the way back, each time.
METHODS: dict[str, Method] = {
    "fo": Method(FOOptimizer, "first-order: the direct term alone", _every_step(2, 0)),
    "one_step": Method(OneStepOptimizer, "exact one-step lookahead", _every_step(2, 1)),
    "t1t2": Method(
        T1T2Optimizer,
        "one-step lookahead, by DARTS differences for Optax optimizers",
        _every_step(4, 0),
    ),
    "greedy": Method(
        GreedyOptimizer, "generalized greedy: discounted one-step terms", _every_step(2, 1)
    ),
    "hyperdistill": Method(
        OnlineHypergradientOptimizer,
        "HyperDistill: online hypergradient distillation",
        _every_step(2, 1),
    ),
    "reverse": Method(
        ReverseOptimizer,
        "reverse mode: exact, T stored states",
        lambda steps, size: (2 * steps + 1, steps),
    ),
    "reversible": Method(
        ReversibleOptimizer,
        "reverse mode, SGD with momentum run backwards: exact, bits stored",
        lambda steps, size: (3 * steps + 1, steps),
    ),
    "forward": Method(
        ForwardOptimizer,
        "forward mode: exact, one product per hyperparameter",
        lambda steps, size: (steps + 1, steps * size),
    ),
    "rtho": Method(
        ForwardOptimizer,
        "forward mode while the hyperparameters move (RTHO)",
        lambda steps, size: (2 * steps, steps * size),
        MappingProxyType({"online": True}),
    ),
    "fds": Method(
        FDSOptimizer,
        "forward mode for schedules, one value per piece (FDS)",
        lambda steps, size: (steps + 1, steps * size),
    ),
    "drmad": Method(
        DrMADOptimizer,
        "reverse mode along a straight line, two stored states",
        lambda steps, size: (2 * steps + 1, steps),
    ),
    "implicit_cg": _implicit("conjugate gradients", cg(), 100, more=3),
    "implicit_neumann": _implicit("20 Neumann iterations", neumann(), 20),
    "implicit_nystrom": _implicit("Nystrom approximation of rank 10", nystrom(), 10),
    "implicit_identity": _implicit("curvature ignored", identity(), 0),
    "es": Method(
        ESOptimizer,
        "evolution strategies over T steps, 16 antithetic pairs",
        lambda steps, size: (33 * (steps + 1), 0),
    ),
    "pes": Method(
        PESOptimizer,
        "persistent evolution strategies, 16 pairs, windows of 10",
        lambda steps, size, window=10: (33 * (steps + steps // window), 0),
    ),
    "soba": Method(
        SOBAOptimizer,
        "single loop: weights, linear system and hyperparameters, a step each",
        _every_step(2, 1),
    ),
    "saba": Method(SABAOptimizer, "SOBA with SAGA averages", _every_step(2, 1)),
    "amigo": Method(
        AmIGOOptimizer,
        "ten inner steps, ten steps on the linear system, warm-started",
        lambda steps, size, window=10: (steps + steps / window, 11 * steps / window),
    ),
    "stocbio": Method(
        StocBiOOptimizer,
        "ten inner steps, Neumann series with a batch per term",
        lambda steps, size, window=10: (steps + steps / window, 11 * steps / window),
    ),
    "f2sa": Method(
        F2SAOptimizer,
        "penalty method, first-order derivatives alone",
        lambda steps, size, window=10: (3 * steps + 3 * steps / window, 0),
    ),
}
