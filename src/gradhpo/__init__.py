"""gradhpo: gradient-based hyperparameter optimization in JAX.

Hypergradients, the derivatives of a validation loss with respect to anything training
depends on, by a choice of methods behind one interface: `init`, `step`,
`compute_hypergradient`, `run`; and, below the classes, pure functions for `jit`, `vmap`
and `scan`.

The names are grouped in `__all__`. Groups with a package of their own, `gradhpo.estimators`,
`gradhpo.solvers`, `gradhpo.outer`, `gradhpo.transforms`, `gradhpo.datasets` and
`gradhpo.testing`, hold more than the names that stand here.
"""

from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.discounted_sum import DiscountedSumOptimizer
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
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.delay import update_every, update_last
from gradhpo.core.dynamics import Dynamics, InnerState, from_optax, from_update, linearize
from gradhpo.core.estimator import Estimate, Estimator, Unrolled
from gradhpo.core.loop import linear_decay, run_episode, run_episodes
from gradhpo.core.problem import BilevelProblem, Start, Window, outer_gradients
from gradhpo.core.source import InOrder, Picked, Pool, Resident
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status, status_message
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch, LossFn, LossFunctions, MetricDict, PyTree
from gradhpo.diagnostics import HypergradientCheck, check_hypergradient
from gradhpo.driver.caches import clear_caches
from gradhpo.driver.failure import UpdateRejected
from gradhpo.driver.hooks import StopRun
from gradhpo.driver.tune import tune
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.discounted_sum import discounted_sum
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.evolution import es, pes
from gradhpo.estimators.f2sa import f2sa
from gradhpo.estimators.finite_difference import finite_difference
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.forward import forward, forward_sharing
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.estimators.reverse import reverse, unrolled_gradients
from gradhpo.estimators.reversible import Reversed, reversible, reversible_gradients
from gradhpo.estimators.saba import saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.estimators.virtual import virtual_step
from gradhpo.outer import Outer
from gradhpo.solvers import cg, cgls, dense, gmres, identity, minres, neumann, nystrom
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
    # the problem
    "BilevelProblem",
    "Dynamics",
    "InnerState",
    "Start",
    "Task",
    "Window",
    "from_optax",
    "from_update",
    # data
    "DataBatch",
    "InOrder",
    "Picked",
    "Pool",
    "Resident",
    # methods as classes
    "AmIGOOptimizer",
    "BilevelOptimizer",
    "DiscountedSumOptimizer",
    "DrMADOptimizer",
    "ESOptimizer",
    "F2SAOptimizer",
    "FDSOptimizer",
    "FOOptimizer",
    "ForwardOptimizer",
    "GreedyOptimizer",
    "ImplicitOptimizer",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PESOptimizer",
    "ReverseOptimizer",
    "ReversibleOptimizer",
    "SABAOptimizer",
    "SOBAOptimizer",
    "StocBiOOptimizer",
    "T1T2Optimizer",
    # methods as functions: gradhpo.estimators
    "Estimate",
    "Estimator",
    "amigo",
    "discounted_sum",
    "drmad",
    "es",
    "f2sa",
    "finite_difference",
    "first_order",
    "forward",
    "forward_sharing",
    "greedy",
    "hyperdistill",
    "implicit",
    "one_step",
    "over_tasks",
    "pes",
    "reverse",
    "reversible",
    "saba",
    "soba",
    "stocbio",
    "update_every",
    "update_last",
    "virtual_step",
    # linear solvers of `implicit`: gradhpo.solvers
    "cg",
    "cgls",
    "dense",
    "gmres",
    "identity",
    "minres",
    "neumann",
    "nystrom",
    # outer updates: gradhpo.outer
    "Outer",
    "linear_decay",
    # runs
    "BilevelState",
    "StopRun",
    "bilevel_step",
    "clear_caches",
    "init_state",
    "run_episode",
    "run_episodes",
    "tune",
    # what came out
    "GradhpoWarning",
    "HypergradientCheck",
    "Status",
    "UpdateRejected",
    "check_hypergradient",
    "status_message",
    # derivatives, for methods of your own
    "Reversed",
    "Unrolled",
    "linearize",
    "outer_gradients",
    "reversible_gradients",
    "unrolled_gradients",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
    # types and trees
    "LossFn",
    "LossFunctions",
    "MetricDict",
    "PyTree",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "update_w_star",
]
