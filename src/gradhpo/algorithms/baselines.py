"""The two baselines: exact one-step lookahead, and the direct term alone."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.one_step import one_step

__all__ = ["ENTRIES", "FOOptimizer", "OneStepOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStepOptimizer(EstimatorOptimizer):
    """Exact one-step lookahead: `dL_val/dlam + alpha_t B_t` after every inner step.

    Source:
        Luketina et al. (2016), section 2. See `gradhpo.estimators.one_step`.

    >>> opt = OneStepOptimizer(update_fn=lambda w, lam, batch: w - lam * (w - batch))
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.step(opt.init(1.0, 0.5), 2.0, 2.0, judge, judge, lr_hyper=0.1)
    >>> print(state.params, state.hyperparams)
    1.5 0.6
    """

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop  # one step at a time
        return one_step()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FOOptimizer(EstimatorOptimizer):
    """First-order: `dL_val/dlam` with the weights held fixed.

    Zero, with a warning, for hyperparameters that are not in the validation loss.

    Source:
        Liu et al. (2019), section 2.3 with xi = 0. See `gradhpo.estimators.first_order`.

    >>> opt = FOOptimizer(update_fn=lambda w, lam, batch: w - 0.5 * (w - batch))
    >>> judge = lambda w, lam, batch: (w + lam - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 3.0, judge, judge))
    -2.0
    """

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop  # one step at a time
        return first_order()


ENTRIES = (
    Method(
        "fo",
        FOOptimizer,
        first_order,
        "first-order: the direct term alone",
        Example(problems=("contraction",), not_exact_on=("outer_lam",)),
        Summary(
            "first order",
            "first_order",
            "the direct term",
            "–",
            "weights do not react to the hyperparameters",
            "hyperparameters that stand in the validation loss (features, architecture weights)",
        ),
        usual=True,
    ),
    Method(
        "one_step",
        OneStepOptimizer,
        one_step,
        "exact one-step lookahead",
        Example(
            problems=("integer_leaves", "batch_norm"),
            exact_on=("ridge", "integer_leaves", "batch_norm"),
            not_exact_on=(("outer_lam", 3), ("batch_norm", 3), "initial_scale"),
        ),
        Summary(
            "one step",
            "one_step",
            "the last step's effect",
            "$P$",
            "the horizon is one step",
            "regularization, sample weights, tuned online",
        ),
        usual=True,
    ),
)
