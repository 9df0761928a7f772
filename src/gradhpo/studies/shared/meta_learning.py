"""What the studies after Lee et al. (2022) share: models and methods by name, their schedules."""

import warnings
from typing import Any, NamedTuple

import optax

from gradhpo.core.delay import update_every, update_last
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.problem import Begin, BilevelProblem
from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status
from gradhpo.core.task import Task
from gradhpo.driver.tune import tune
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.meta.anil import Anil
from gradhpo.meta.augment import moved
from gradhpo.meta.networks import ConvNet, MetaModel, Shape
from gradhpo.meta.warpgrad import WarpGrad
from gradhpo.meta.weighted import Weighted
from gradhpo.solvers import neumann
from gradhpo.utils.validation import GradhpoWarning

__all__ = [
    "FIT_PERIOD",
    "META_METHODS",
    "META_MODELS",
    "Schedule",
    "decayed_sgd",
    "meta_method",
    "meta_model",
    "problem_of",
    "remark",
    "schedule_of",
    "tuned",
    "updates",
]

FIT_PERIOD = 50  # inner-optimizations between two fits of HyperDistill's theta
MOMENTUM = 0.9  # of training, and of the hyperparameters
META_METHODS = ("fo", "one_step", "drmad", "implicit_neumann", "hyperdistill")
META_MODELS = ("anil", "warpgrad", "meta_weight_net")


class Schedule(NamedTuple):
    """When and how far the methods look.

    Attributes:
        steps: T, of an inner-optimization.
        rate: Of the inner optimizer; the step of the Neumann series too.
        neumann: N products at each of the last K' steps.
        every: Steps per hypergradient of FO, one-step and HyperDistill. With 2 and T = 100 a
            one-step method has the 50 products of the paper's table 2.
        gamma: Discount of HyperDistill.
    """

    steps: int
    rate: float
    neumann: tuple[int, int]
    every: int = 2
    gamma: float = 0.99


def schedule_of(model: str, steps: int, every: int = 2, gamma: float = 0.99) -> Schedule:
    """The paper's for a model; N.IFT(2, 25) and (10, 5) of T = 100 keep their share of the steps.

    >>> schedule_of("warpgrad", 40).neumann
    (10, 2)
    """
    terms, share = (10, 20) if model == "warpgrad" else (2, 4)
    rate = 0.1 if model == "meta_weight_net" else 0.01
    return Schedule(steps, rate, (terms, max(1, steps // share)), every, gamma)


def meta_model(name: str, shape: Shape, ways: int, channels: int) -> MetaModel:
    """One of `META_MODELS` for images of this shape."""
    if name == "anil":
        return Anil(shape, ways, channels)
    if name == "warpgrad":
        return WarpGrad(shape, ways, channels)
    return Weighted(ConvNet(shape, ways, channels))


def problem_of(
    model: MetaModel, pad: int, rate: float, begin: Begin | None = None
) -> BilevelProblem:
    """SGD with momentum on images moved by at most `pad` pixels, judged on images as they are."""
    optimizer = optax.sgd(rate, momentum=MOMENTUM)
    dynamics = from_optax(moved(model.train_loss, pad), optimizer)
    return BilevelProblem(dynamics, model.val_loss, begin=begin)


def meta_method(name: str, schedule: Schedule) -> Estimator:
    """One of `META_METHODS` for one task.

    DrMAD and the fit of theta leave the momentum of training out of alpha A, by which the paper's
    numbers on sinusoids come out.

    >>> meta_method("one_step", schedule_of("anil", 100)).cost(T=100, size=1).products
    50
    """
    steps, rate, (terms, last), every, gamma = schedule
    if name == "drmad":
        return drmad(steps, slots="ignored")
    if name == "implicit_neumann":
        return update_last(implicit(1, neumann(terms, rate)), last, steps)
    online = {"fo": first_order, "one_step": one_step}.get(name)
    estimator = hyperdistill(gamma, slots="ignored") if online is None else online()
    return update_every(estimator, every)


def updates(estimator: Estimator, steps: int) -> int:
    """Outer updates of an episode of so many steps."""
    return (steps - estimator.lead) // estimator.unroll_steps


def tuned(
    task: Task, estimator: Estimator, outer: optax.GradientTransformation, **rest: Any
) -> BilevelState:
    """`gradhpo.tune` for convolutions that are products of matrices, without its warnings: a short
    Neumann series is never accurate, and `remark` says what happened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradhpoWarning)
        return tune(task, estimator, outer, loop="scan", progress=False, **rest)


def remark(state: BilevelState) -> str:
    """What is worth a look where a run ends: theta, and statuses other than OK."""
    theta = getattr(state.memory, "theta", None)
    said = [] if theta is None else [f"theta {float(theta.ravel()[0]):.2f}"]
    said += [f"{code.name} {n}" for code, n in state.status_counts.items() if code != Status.OK]
    return "".join(f", {each}" for each in said)


def decayed_sgd(rate: float, count: int) -> optax.GradientTransformation:
    """SGD with momentum, its rate falling in a line to zero over so many updates."""
    return optax.sgd(optax.linear_schedule(rate, 0.0, count), momentum=MOMENTUM)
