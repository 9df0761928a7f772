"""gradhpo: gradient-based hyperparameter optimization in JAX.

Hypergradients, the derivatives of a validation loss with respect to anything training
depends on, by a choice of methods behind one interface: `init`, `step`,
`compute_hypergradient`, `run`; and, below the classes, pure functions for `jit`, `vmap`
and `scan`.
"""

from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import ReverseOptimizer
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.dynamics import Dynamics, InnerState, from_optax, from_update, linearize
from gradhpo.core.estimator import Estimate, Estimator
from gradhpo.core.loop import linear_decay, run_episode, run_episodes
from gradhpo.core.problem import BilevelProblem, Window, outer_gradients
from gradhpo.core.source import Resident
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status, status_message
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.types import DataBatch, LossFn, LossFunctions, MetricDict, PyTree
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.finite_difference import finite_difference
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse
from gradhpo.utils.gradients import (
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
    update_w_star,
    vjp_wrt_both,
    vjp_wrt_lambda,
)
from gradhpo.utils.validation import GradhpoWarning

__version__ = "0.2.0"

__all__ = [
    "BilevelOptimizer",
    "BilevelProblem",
    "BilevelState",
    "DataBatch",
    "Dynamics",
    "Estimate",
    "Estimator",
    "FOOptimizer",
    "GradhpoWarning",
    "GreedyOptimizer",
    "InnerState",
    "LossFn",
    "LossFunctions",
    "MetricDict",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PyTree",
    "Resident",
    "ReverseOptimizer",
    "Status",
    "T1T2Optimizer",
    "Window",
    "bilevel_step",
    "finite_difference",
    "first_order",
    "from_optax",
    "from_update",
    "greedy",
    "hyperdistill",
    "init_state",
    "linear_decay",
    "linearize",
    "one_step",
    "outer_gradients",
    "reverse",
    "run_episode",
    "run_episodes",
    "status_message",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "update_w_star",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
]
