"""Single-loop stochastic bilevel methods: hypergradients of the minimum, as training goes on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms._windowed import WindowedOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.types import Batch
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.f2sa import f2sa, growing_penalty
from gradhpo.estimators.saba import part_index, saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.utils.schedules import Schedule

__all__ = [
    "ENTRIES",
    "AmIGOOptimizer",
    "F2SAOptimizer",
    "SABAOptimizer",
    "SOBAOptimizer",
    "StocBiOOptimizer",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SOBAOptimizer(EstimatorOptimizer):
    """SOBA: weights, linear system and hyperparameters take one step each per batch.

    For hyperparameters of the training loss; one of the optimizer (a learning rate) is
    refused. The same holds for every class of this module.

    Args:
        step_size: Rate of the linear system: a number, or a function of the count of
            updates.

    Source:
        Dagréou et al. (2022). See `gradhpo.estimators.soba`.

    >>> import optax
    >>> opt = SOBAOptimizer(inner_optimizer=optax.sgd(0.5), outer_optimizer=optax.sgd(0.1), T=100)
    >>> train = lambda w, lam, batch: (w - lam * batch) ** 2 / 2  # least at w = lam
    >>> judge = lambda w, lam, batch: (w - 3.0) ** 2 / 2
    >>> state = opt.run(
    ...     opt.init(0.0, 1.0),
    ...     M=5,
    ...     get_train_batch=lambda: 1.0,
    ...     get_val_batch=lambda: 1.0,
    ...     train_loss_fn=train,
    ...     val_loss_fn=judge,
    ... )
    >>> print(f"{state.hyperparams:.3f}")
    3.000
    """

    step_size: Schedule = 0.1

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop
        return soba(self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SABAOptimizer(EstimatorOptimizer):
    """SABA: SOBA with SAGA averages over a fixed partition of the data; constant rates converge.

    Args:
        train_batches, val_batches: Numbers of parts the data are cut into; required.
        step_size: Rate of the linear system.
        index: `index(batch)`, the number of the part that a batch is; see
            `gradhpo.estimators.saba` for how such batches are made.

    Source:
        Dagréou et al. (2022). See `gradhpo.estimators.saba`.

    >>> import jax.numpy as jnp, optax
    >>> opt = SABAOptimizer(inner_optimizer=optax.sgd(0.5), train_batches=4, val_batches=1)
    >>> train = lambda w, lam, batch: (w - lam * batch["x"]) ** 2 / 2
    >>> judge = lambda w, lam, batch: (w - batch["x"]) ** 2 / 2
    >>> state = opt.init(1.0, 2.0)
    >>> part = {"x": jnp.array(1.0), "index": jnp.array(0)}
    >>> print(opt.step(state, part, part, train, judge, lr_hyper=0.1).params)
    1.5
    """

    uses_optimizer = "sends an averaged gradient"

    train_batches: int | None = None
    val_batches: int | None = None
    step_size: float = 0.1
    index: Callable[[Batch], Any] = part_index

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop
        parts = self.train_batches, self.val_batches
        if None in parts:
            name = ("train_batches", "val_batches")[parts.index(None)]
            raise ValueError(
                f"SABAOptimizer needs {name}=, the number of parts that data are cut into."
            )
        return saba(*parts, self.step_size, index=self.index)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmIGOOptimizer(WindowedOptimizer):
    """AmIGO: `unroll_steps` on the weights, then `u_steps` on a warm-started linear system.

    `run` draws a batch for every inner step; `step` has one batch and repeats it.

    Args:
        unroll_steps: Inner steps per outer update.
        u_steps: Steps on the linear system per outer update.
        step_size: Their rate.
        T: Inner steps per episode, a multiple of `unroll_steps` and by default equal to it.

    Source:
        Arbel and Mairal (2022). See `gradhpo.estimators.amigo`.

    >>> opt = AmIGOOptimizer(update_fn=lambda w, lam, batch: lam, u_steps=2, step_size=0.5)
    >>> train = lambda w, lam, batch: (w - lam) ** 2 / 2
    >>> judge = lambda w, lam, batch: (w - 3.0) ** 2 / 2
    >>> print(opt.compute_hypergradient(opt.init(0.0, 1.0), 0.0, 0.0, train, judge))
    -1.5
    """

    u_steps: int = 10
    step_size: float = 0.1

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return amigo(self.unroll_steps, self.u_steps, self.step_size, loop=loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StocBiOOptimizer(WindowedOptimizer):
    """StocBiO: `unroll_steps` on the weights, then a Neumann series.

    `run` draws a batch for every inner step; `step` has one batch and repeats it.

    Args:
        unroll_steps: Inner steps per outer update.
        terms: Products of the series.
        step_size: a of the series, at most 1 over the largest eigenvalue of the Hessian.
        T: Inner steps per episode, a multiple of `unroll_steps` and by default equal to it.

    Source:
        Ji et al. (2021). See `gradhpo.estimators.stocbio`.

    >>> opt = StocBiOOptimizer(update_fn=lambda w, lam, batch: lam, terms=1, step_size=0.5)
    >>> train = lambda w, lam, batch: (w - lam) ** 2 / 2
    >>> judge = lambda w, lam, batch: (w - 3.0) ** 2 / 2
    >>> print(opt.compute_hypergradient(opt.init(0.0, 1.0), 0.0, 0.0, train, judge))
    -1.5
    """

    terms: int = 10
    step_size: float = 0.1

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return stocbio(self.unroll_steps, self.terms, self.step_size, loop=loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class F2SAOptimizer(WindowedOptimizer):
    """F2SA: a second copy of the weights under a penalty; no second derivatives.

    `run` draws a batch for every inner step; `step` has one batch and repeats it.

    Args:
        unroll_steps: Inner steps per outer update, of both copies.
        penalty: kappa: a number, or a function of the count of updates, by default
            `1 + count / 10`.
        y_scale: Steps of the second copy in those of the inner optimizer, likewise: its own
            learning rate.
        T: Inner steps per episode, a multiple of `unroll_steps` and by default equal to it.

    Source:
        Kwon et al. (2023). See `gradhpo.estimators.f2sa`.

    >>> import optax
    >>> opt = F2SAOptimizer(inner_optimizer=optax.sgd(0.5), penalty=3.0)
    >>> train = lambda w, lam, batch: (w - lam) ** 2 / 2
    >>> judge = lambda w, lam, batch: (w - 3.0) ** 2 / 2  # -2 through the minimum w = lam
    >>> h = opt.compute_hypergradient(opt.init(1.0, 1.0), 0.0, 0.0, train, judge)
    >>> print(f"{h:.3f}")  # -2 kappa / (kappa + 1)
    -1.500
    """

    uses_optimizer = "trains a second copy of the weights on another loss"

    penalty: Schedule = growing_penalty
    y_scale: Schedule = 1.0

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return f2sa(self.unroll_steps, self.penalty, self.y_scale, loop=loop)


_SINGLE_LOOP = Summary(
    "single loop",
    "single_loop",
    "the implicit derivative, warm-started",
    "$P$; SABA a table",
    "in the limit",
    "stochastic bilevel problems with a unique minimum",
    remark="; F2SA first order",
)


def _the_only_part(batch: Batch) -> int:
    return 0


ENTRIES = (
    Method(
        "soba",
        SOBAOptimizer,
        soba,
        "single loop: weights, linear system and hyperparameters, a step each",
        # u lags behind: exact in the limit, as its own tests show.
        Example(
            problems=("at_minimum",), not_exact_on=("at_minimum",), settings={"step_size": 0.5}
        ),
        _SINGLE_LOOP,
    ),
    Method(
        "saba",
        SABAOptimizer,
        saba,
        "SOBA with SAGA averages",
        Example(
            problems=("at_minimum",),
            not_exact_on=("at_minimum",),
            settings={
                "train_batches": 1,
                "val_batches": 1,
                "step_size": 0.5,
                "index": _the_only_part,
            },
            of_class={"train_batches": 1, "val_batches": 1, "index": _the_only_part},
            trained_by=optax.sgd,
        ),
        _SINGLE_LOOP,
        needs=("train_batches", "val_batches"),
    ),
    Method(
        "amigo",
        AmIGOOptimizer,
        amigo,
        "ten inner steps, ten steps on the linear system, warm-started",
        # Forty steps on u reach u H = alpha at every update.
        Example(
            problems=("at_minimum",),
            exact_on=("at_minimum",),
            not_exact_on=("outer_lam",),
            settings={"unroll_steps": 2, "u_steps": 40, "step_size": 1.0},
            of_class={"unroll_steps": 2},
        ),
        _SINGLE_LOOP,
        most_unroll_steps=10,
    ),
    Method(
        "stocbio",
        StocBiOOptimizer,
        stocbio,
        "ten inner steps, Neumann series with a batch per term",
        Example(
            problems=("at_minimum",),
            exact_on=("at_minimum",),
            not_exact_on=("outer_lam",),
            settings={"unroll_steps": 2, "terms": 40, "step_size": 1.0},
            of_class={"unroll_steps": 2},
        ),
        _SINGLE_LOOP,
        most_unroll_steps=10,
    ),
    Method(
        "f2sa",
        F2SAOptimizer,
        f2sa,
        "penalty method, first-order derivatives alone",
        Example(
            problems=("outer_lam",),
            not_exact_on=("outer_lam",),
            settings={"unroll_steps": 2},
            of_class={"unroll_steps": 2},
            trained_by=optax.sgd,
        ),
        _SINGLE_LOOP,
        most_unroll_steps=10,
    ),
)
