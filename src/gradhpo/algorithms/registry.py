"""Every method by name: what studies, the command line and the tests choose from."""

from typing import NamedTuple

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import ReverseOptimizer

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A method and its price per inner step, in the units of `docs/notation.md`.

    Gradients count training and validation gradients alike; a product is one Hessian and
    mixed product. HyperDistill's fits of theta come on top: T + 1 gradients, and T gradients
    and 2T products on the way back, each time.
    """

    optimizer: type[EstimatorOptimizer]
    description: str
    gradients: float
    products: float


METHODS: dict[str, Method] = {
    "fo": Method(FOOptimizer, "first-order: the direct term alone", 2, 0),
    "one_step": Method(OneStepOptimizer, "exact one-step lookahead", 2, 1),
    "t1t2": Method(
        T1T2Optimizer, "one-step lookahead, by DARTS differences for Optax optimizers", 4, 0
    ),
    "greedy": Method(GreedyOptimizer, "generalized greedy: discounted one-step terms", 2, 1),
    "hyperdistill": Method(
        OnlineHypergradientOptimizer, "HyperDistill: online hypergradient distillation", 2, 1
    ),
    "reverse": Method(ReverseOptimizer, "full reverse mode: exact, T stored states", 2, 1),
}
