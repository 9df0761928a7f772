"""Single-loop stochastic bilevel methods: hypergradients of the minimum, as training goes on."""

import dataclasses
from collections.abc import Callable
from typing import Any

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.types import Batch
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.f2sa import f2sa, growing_penalty
from gradhpo.estimators.saba import part_index, saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.utils.schedules import Schedule

__all__ = [
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator()  # refuses bad settings

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

    train_batches: int | None = None
    val_batches: int | None = None
    step_size: float = 0.1
    index: Callable[[Batch], Any] = part_index

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_batches", "val_batches"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"SABAOptimizer needs {name}=, the number of parts that data are cut into."
                )
        self.estimator()  # refuses bad settings
        if self.inner_optimizer is None:
            raise ValueError(
                "SABAOptimizer sends an averaged gradient through the inner optimizer, which an "
                "update_fn has no place for: give inner_optimizer=, or use SOBAOptimizer."
            )

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop
        assert self.train_batches is not None and self.val_batches is not None
        return saba(self.train_batches, self.val_batches, self.step_size, index=self.index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Windowed(EstimatorOptimizer):
    """A method with several inner steps per update: T is that number unless given."""

    unroll_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.estimator().window  # refuses bad settings
        self._settle(T=self._episode_length(window if self.T is None else self.T))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmIGOOptimizer(_Windowed):
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
class StocBiOOptimizer(_Windowed):
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
class F2SAOptimizer(_Windowed):
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

    penalty: Schedule = growing_penalty
    y_scale: Schedule = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_optimizer is None:
            raise ValueError(
                "F2SAOptimizer trains a second copy of the weights on another loss by the inner "
                "optimizer, which an update_fn has no place for: give inner_optimizer=, or use "
                "StocBiOOptimizer."
            )

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return f2sa(self.unroll_steps, self.penalty, self.y_scale, loop=loop)
