"""Hypergradients through the unrolled training run: reverse and forward mode, and DrMAD.

One hypergradient per `T` inner steps. `step` has one batch and repeats it for all of them; `run`
draws one for every step.
"""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.forward import BUDGET, forward, forward_sharing
from gradhpo.estimators.reverse import reverse
from gradhpo.estimators.reversible import reversible
from gradhpo.transforms import reversible_sgd

__all__ = [
    "ENTRIES",
    "DrMADOptimizer",
    "FDSOptimizer",
    "ForwardOptimizer",
    "ReverseOptimizer",
    "ReversibleOptimizer",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseOptimizer(EstimatorOptimizer):
    """Reverse mode: one exact hypergradient per T steps, from stored states.

    Args:
        T: Inner steps per hypergradient; required.
        truncate: Differentiate the last K steps only; what acts earlier (initial weights,
            the beginning of a schedule) then has a hypergradient of zero.
        memory: "trajectory" stores T states, and only slots for the optimizers of
            `gradhpo.transforms`; "segments" about 2 sqrt(T), and trains twice; "reversible"
            none, see `ReversibleOptimizer`.
        budget: Bytes for the states of "segments".

    Source:
        Franceschi et al. (2017), algorithm 1; Shaban et al. (2019). See
        `gradhpo.estimators.reverse`, also for derivatives with respect to initial weights.

    >>> opt = ReverseOptimizer(update_fn=lambda w, lam, batch: w - lam * (w - batch), T=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    -0.5
    """

    truncate: int | None = None
    memory: str = "trajectory"
    budget: int | None = None

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return reverse(
            self.horizon, truncate=self.truncate, memory=self.memory, budget=self.budget, loop=loop
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReversibleOptimizer(EstimatorOptimizer):
    """Reverse mode along a run of SGD with momentum that is run backwards bit by bit.

    Args:
        inner_optimizer: A factory of `gradhpo.transforms.reversible_sgd(rate, momentum)`.
        T: Inner steps per hypergradient; required.
        least_momentum: What the buffers are sized for where the momentum is a hyperparameter:
            it does not fall below this, at least in the geometric mean of the steps.

    Numbers are rounded to 2^-52 where JAX runs with 64 bits, and to 2^-20 otherwise.

    Source:
        Maclaurin et al. (2015), algorithms 1 to 3. See `gradhpo.estimators.reversible`, also
        for derivatives with respect to initial weights and velocities.

    >>> from gradhpo.transforms import reversible_sgd
    >>> rate = lambda lam: reversible_sgd(lam, momentum=0.5)
    >>> opt = ReversibleOptimizer(inner_optimizer=rate, T=2)
    >>> loss = lambda w, lam, batch: (w - batch) ** 2 / 2
    >>> state = opt.init(0.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 1.0, 1.0, loss, loss))
    -0.4375
    """

    least_momentum: float | None = None

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return reversible(self.horizon, least_momentum=self.least_momentum, loop=loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptimizer(EstimatorOptimizer):
    """Forward mode: exact, for few hyperparameters and any number of steps.

    Args:
        T: Inner steps per hypergradient; required unless `online`.
        online: RTHO: one hypergradient every `unroll_steps` steps, through the whole
            episode so far.
        unroll_steps: Inner steps between two updates of the online form.
        budget: Bytes that the derivative of the state may take.

    Source:
        Franceschi et al. (2017), algorithm 2 and section 3.3. See
        `gradhpo.estimators.forward`.

    >>> opt = ForwardOptimizer(update_fn=lambda w, lam, batch: w - lam * (w - batch), T=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    -0.5
    """

    online: bool = False
    unroll_steps: int = 1
    budget: int = BUDGET

    def estimator(self, loop: Loop = "scan") -> Estimator:
        steps = self.unroll_steps if self.online else self.horizon
        return forward(steps, online=self.online, budget=self.budget, loop=loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDSOptimizer(EstimatorOptimizer):
    """Forward differentiation with sharing: a schedule with one value per piece of the run.

    Args:
        T: Inner steps of a run; required.
        pieces: Entries along the leading axis of every leaf of the hyperparameters; entry j
            acts in the j-th of as many equal pieces of the run.
        average: The mean over the steps of a piece, whose scale is that of one step, instead
            of their sum.
        budget: Bytes that the derivative of the state may take.

    An episode is one run; `run(..., lr_reptile=0)` starts each from the same weights.

    Source:
        Micaelli & Storkey (2021). See `gradhpo.estimators.forward.forward_sharing`.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> rates = lambda lam: optax.sgd(lambda count: lam[count // 2])
    >>> opt = FDSOptimizer(inner_optimizer=rates, pieces=3, T=6, average=False)
    >>> loss = lambda w, lam, batch: 0.5 * (w - batch) ** 2
    >>> state = opt.init(0.0, jnp.array([0.5, 0.2, 0.1]))
    >>> print(opt.compute_hypergradient(state, 1.0, 1.0, loss, loss).round(3))
    [-0.067 -0.042 -0.037]
    """

    pieces: int = 5
    average: bool = True
    budget: int = BUDGET

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return forward_sharing(
            self.horizon,
            self.pieces,
            average=self.average,
            budget=self.budget,
            loop=loop,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrMADOptimizer(EstimatorOptimizer):
    """Reverse mode along the straight line from w_0 to w_T: two states of memory.

    Args:
        T: Inner steps per hypergradient; required.
        slots: "differentiated" or "ignored": whether derivatives go through the slots of the
            inner optimizer. With momentum the numbers of Lee et al. (2022) ask for "ignored".

    Source:
        Fu et al. (2016). See `gradhpo.estimators.drmad`.

    >>> opt = DrMADOptimizer(update_fn=lambda w, lam, batch: w - lam * batch, T=2)
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, judge, judge))
    24.0
    """

    slots: str = "differentiated"

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return drmad(self.horizon, slots=self.slots, loop=loop)


_FORWARD = Summary(
    "forward",
    "forward",
    "the same; online: RTHO",
    "$H S$",
    "always, for the window",
    "a handful of hyperparameters, any horizon",
)

ENTRIES = (
    Method(
        "reverse",
        ReverseOptimizer,
        reverse,
        "reverse mode: exact, T stored states",
        Example(
            problems=("integer_leaves",),
            exact_on=("integer_leaves", "batch_norm", "initial_scale", "initial_weights"),
            settings={"T": 3},
        ),
        Summary(
            "reverse",
            "reverse",
            "everything in the window",
            r"$T S$; in segments $2\sqrt{T} S$",
            "always, for the window",
            "the reference; learning rates, momentum, short horizons",
        ),
        usual=True,
    ),
    Method(
        "reversible",
        ReversibleOptimizer,
        reversible,
        "reverse mode, SGD with momentum run backwards: exact, bits stored",
        Example(
            problems=("run_backwards",),
            exact_on=("run_backwards", "there_and_back"),
            settings={"T": 3},
            trained_by=lambda rate: reversible_sgd(rate, momentum=0.5),
        ),
        Summary(
            "reversible",
            "reversible",
            "everything in the window",
            "two integers and bits",
            "always, for SGD with momentum",
            "long windows that nothing else fits; schedules per step",
        ),
    ),
    Method(
        "forward",
        ForwardOptimizer,
        forward,
        "forward mode: exact, one product per hyperparameter",
        Example(
            problems=("outer_lam",),
            exact_on=("integer_leaves", "batch_norm", "initial_scale", "initial_weights"),
            settings={"T": 3},
        ),
        _FORWARD,
        usual=True,
    ),
    Method(
        "rtho",
        ForwardOptimizer,
        forward,
        "forward mode while the hyperparameters move (RTHO)",
        Example(
            problems=("contraction",),
            exact_on=(("integer_leaves", 3), ("batch_norm", 3), ("initial_scale", 3)),
        ),
        _FORWARD,
        settings={"online": True},
    ),
    Method(
        "fds",
        FDSOptimizer,
        forward_sharing,
        "forward mode for schedules, one value per piece (FDS)",
        Example(
            problems=("three_pieces",),
            exact_on=("three_pieces",),
            settings={"T": 3, "pieces": 3, "average": False},
            of_class={"pieces": 1},
        ),
        Summary(
            "sharing",
            "forward",
            "a schedule, one value per piece",
            "$H S$",
            "the values are constant on their pieces",
            "schedules over long runs",
            remark=" with 3 pieces",
        ),
        needs=("pieces",),
    ),
    Method(
        "drmad",
        DrMADOptimizer,
        drmad,
        "reverse mode along a straight line, two stored states",
        Example(
            problems=("contraction",),
            exact_on=("straight_line", "initial_weights"),
            not_exact_on=("outer_lam", "batch_norm", "initial_scale"),
            settings={"T": 3},
        ),
        Summary(
            "DrMAD",
            "drmad",
            "everything, along a straight line",
            "2 $S$",
            "the trajectory is a straight line",
            "long windows that do not fit",
        ),
        usual=True,
    ),
)
