"""The one body of `init`, `step`, `compute_hypergradient` and `run`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradhpo.algorithms._setups import initializer, problem_of, setup_of
from gradhpo.checkpoint.settings import CheckpointArgument
from gradhpo.core import episode as episodes
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.delay import update_every, update_last
from gradhpo.core.dynamics import is_optimizer
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.outer import Outer, check_outer
from gradhpo.core.problem import Begin, Window
from gradhpo.core.source import BatchSource
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer
from gradhpo.core.types import (
    Batch,
    Hyper,
    LossFn,
    MakeOptimizer,
    MetricDict,
    Params,
    PyTree,
    UpdateFn,
)
from gradhpo.driver import single
from gradhpo.driver.data import Data
from gradhpo.driver.failure import OnFailure
from gradhpo.driver.plan import Plan
from gradhpo.driver.setup import Setup, check_length
from gradhpo.driver.tune import checked_run, found_again
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.estimators.virtual import virtual_step
from gradhpo.utils.arrays import as_arrays
from gradhpo.utils.logging import MetricLogger
from gradhpo.utils.settings import check_callable, check_choice, check_count, check_fraction
from gradhpo.utils.validation import check_batch, check_start, complain

__all__ = ["EstimatorOptimizer"]

LOSS = "(params, hyperparams, batch) -> scalar"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatorOptimizer(BilevelOptimizer):
    """A method as an object with settings and no state; frozen and hashable.

    Args:
        update_fn: The training step, `update_fn(params, hyperparams, batch) -> params`; or
        inner_optimizer: an Optax optimizer, or a factory `hyperparams -> optimizer`, run on
            `train_loss_fn`. Exactly one of the two.
        outer_optimizer: An Optax optimizer for the hyperparameters, or a `gradhpo.Outer`. Without
            one, give `lr_hyper` to `step` or `run`: plain steps.
        begin: How an episode of `run` begins, `begin(params, hyperparams, draw) ->
            gradhpo.Start`; by default where the last one ended. The draw is a PRNG key of the
            episode, or what `get_task` returns.
        tasks: A meta-batch: so many tasks at once, their hypergradients averaged, see
            `gradhpo.estimators.over_tasks`.
        T: Inner steps per episode, for `run` (which may override it).
        update_every: The hyperparameters move after every so many windows of the method, and the
            weights train alone in the others, see `gradhpo.update_every`.
        update_last: They move after the last so many windows of an episode of T steps alone.
        virtual: Looks ahead by this optimizer, of Optax or `hyperparams -> optimizer`, in place of
            the one that trains, see `gradhpo.virtual_step`: `optax.sgd(rate / (1 - momentum))`
            where a short-sighted method would not see what momentum does later.
        loop: How steps are looped over: "scan", "unroll", "host", or "auto", which avoids
            compiled loops for convolutions on CPU, where they are 15-20 times slower.
        strict: Raise instead of warning when a hyperparameter has no effect, the validation loss
            no path to the weights, a parameter no gradient, a batch no examples that HyperDistill
            could keep, or `step` is compiled again and again.
    """

    uses_optimizer = ""  # for what, where the method calls it by itself

    update_fn: UpdateFn | None = None
    inner_optimizer: optax.GradientTransformation | MakeOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | Outer | None = None
    begin: Begin | None = None
    tasks: int | None = None
    T: int | None = None
    update_every: int = 1
    update_last: int | None = None
    virtual: optax.GradientTransformation | MakeOptimizer | None = None
    loop: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        self._make_hashable()
        if (self.update_fn is None) == (self.inner_optimizer is None):
            given = "neither" if self.update_fn is None else "both"
            raise ValueError(
                f"{type(self).__name__} takes either update_fn= (your own training step) or "
                f"inner_optimizer= (an Optax optimizer on train_loss_fn), but got {given}."
            )
        if self.update_fn is not None:
            check_callable("update_fn", self.update_fn, "(params, hyperparams, batch) -> params")
        if self.inner_optimizer is not None and not is_optimizer(self.inner_optimizer):
            check_callable(
                "inner_optimizer", self.inner_optimizer, "hyperparams -> optimizer, or an optimizer"
            )
        outer = self.outer_optimizer
        if outer is not None:
            check_outer("outer_optimizer", outer)
        if self.begin is not None:
            check_callable("begin", self.begin, "(params, hyperparams, draw) -> gradhpo.Start")
        if self.tasks is not None:
            self._settle(tasks=check_count("tasks", self.tasks))
        if self.T is not None:
            self._settle(T=check_count("T", self.T))
        check_choice("loop", self.loop, ("auto", "scan", "unroll", "host"))
        if self.uses_optimizer and self.inner_optimizer is None:
            raise ValueError(
                f"{type(self).__name__} {self.uses_optimizer} through the inner optimizer, which "
                "an update_fn has no place for: give inner_optimizer=, or use another method."
            )
        if self.virtual is not None:
            if not is_optimizer(self.virtual):
                check_callable("virtual", self.virtual, "hyperparams -> optimizer, or an optimizer")
            if self.inner_optimizer is None:
                raise ValueError(
                    "virtual= is another optimizer for a step on the training loss, which an "
                    "update_fn does not tell: give inner_optimizer= instead of update_fn=."
                )
        self.method()  # refuses bad settings,
        _ = self.outer  # and so does this

    def _make_hashable(self) -> None:
        """Numbers that come as arrays become Python's: settings are static under jit."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tracer):
                raise TypeError(
                    f"{field.name} of {type(self).__name__} is static under jit and cannot be "
                    "traced, as it is here; the estimators, such as gradhpo.greedy(gamma), take "
                    "traced rates and weights."
                )
            if isinstance(value, np.generic | np.ndarray | jax.Array):
                value = self._as_number(field.name, value)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}.")
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"{field.name} of {type(self).__name__} is static under jit and must be "
                    f"hashable, which {value!r} ({type(value).__name__}) is not."
                ) from None

    def _as_number(self, name: str, value: Any) -> Any:
        """The Python number of an array of shape (), stored."""
        if np.ndim(value) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name} of {type(self).__name__} is a setting, static under jit, and cannot be an "
                f"array of {value.dtype}{list(value.shape)}. What changes, or has an entry for "
                "every weight, goes into the hyperparameters or the batches."
            )
        self._settle(**{name: value.item()})
        return getattr(self, name)

    def _settle(self, **fields: Any) -> None:
        """Store checked settings, for use in `__post_init__` only."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def estimator(self, loop: Loop = "scan") -> Estimator:
        """The method for one task as a pure `Estimator`, for `gradhpo.bilevel_step`."""
        raise NotImplementedError

    @property
    def horizon(self) -> int:
        """T, for methods that look at an episode as a whole.

        Raises:
            ValueError: it was not given.
        """
        if self.T is None:
            raise ValueError(
                f"{type(self).__name__} needs T=, the number of inner steps that a hypergradient "
                "looks through."
            )
        return self.T

    def method(self, loop: Loop = "scan") -> Estimator:
        """The estimator, looking ahead and moving the hyperparameters as the settings say, over
        `tasks` if there are any."""
        estimator = self.estimator(loop)
        if self.virtual is not None:
            estimator = virtual_step(estimator, self.virtual, loop=loop)
        if self.update_every != 1:
            estimator = update_every(estimator, self.update_every, loop=loop)
        if self.update_last is not None:
            estimator = update_last(estimator, self.update_last, self.horizon)
        return estimator if self.tasks is None else over_tasks(estimator, self.tasks)

    @property
    def outer(self) -> OuterOptimizer:
        """What moves the hyperparameters; None: plain steps of `lr_hyper`."""
        return self.outer_optimizer

    def remarks(self, train_batch: Batch) -> tuple[str, ...]:
        """What a first look at the shapes of a batch has to say; warned of, an error if strict."""
        del train_batch
        return ()

    @property
    def estimation_interval(self) -> int:
        """Episodes between two calls of `estimator.start`."""
        return 1

    # -- one step at a time ---------------------------------------------------------------

    def init(
        self,
        params: Params,
        hyperparams: Hyper,
        train_batch: Batch | None = None,
        *,
        model_state: PyTree = (),
    ) -> BilevelState:
        """A fresh state.

        Args:
            params: Initial weights; leaves that are not floating point are carried along.
            hyperparams: Initial hyperparameters; every leaf floating point.
            train_batch: One batch, whose shape methods that keep data need (HyperDistill)
                if `step` is to be traced by a transformation of yours; `run` does not need it.
            model_state: Batch statistics, PRNG keys, caches: what the losses carry from step to
                step and nobody differentiates. Where one is given, all losses get it as a fourth
                argument and `train_loss_fn` returns `(loss, (model_state, metrics))`, see
                `gradhpo.core.losses`; an `update_fn` takes it and returns `(params, model_state)`.

        Raises:
            TypeError, ValueError: a leaf has the wrong type, hyperparameters are not finite, or
                the batch is empty; the message names the leaf.
        """
        check_start(params, hyperparams, model_state)
        window = None
        if train_batch is not None:
            train_batch = as_arrays(train_batch)
            check_batch("train_batch", train_batch)
            train = jax.tree.map(lambda x: jnp.asarray(x)[None], train_batch)
            window = Window(train, ())
        return initializer(self)(params, hyperparams, window, model_state=model_state)

    def step(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """One outer update; a method with a window of several steps repeats the batch.

        Args:
            state: From `init` or an earlier step; never donated.
            train_batch, val_batch: One batch each.
            train_loss_fn, val_loss_fn: `(params, hyperparams, batch) -> scalar`; the same
                function objects at every call, or everything is compiled again.
            lr_hyper: Outer rate, one number, used as given; required without `outer_optimizer`.

        Returns:
            The new state; `metadata["status"]` says what happened.
        """
        setup = self._setup(train_loss_fn, val_loss_fn)
        return single.step(setup, state, train_batch, val_batch, lr_hyper)

    @overload
    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        *,
        with_metadata: Literal[False] = False,
    ) -> Hyper: ...

    @overload
    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        *,
        with_metadata: Literal[True],
    ) -> tuple[Hyper, MetricDict]: ...

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        *,
        with_metadata: bool = False,
    ) -> Hyper | tuple[Hyper, MetricDict]:
        """The very hypergradient that `step` would apply; the state is untouched.

        Args:
            with_metadata: Return `(hypergradient, metadata)`: the metrics that `step` would report
                of this estimate (`val_loss`, norms, the method's own such as `linear_residual`),
                and `status`, that of `step` before its outer update: whether what the step has
                computed so far is finite, and what the method says of it. Works under `jit` and
                `vmap`, as the hypergradient does. Nothing is undone: with a status that `rejects`,
                do not use the hypergradient.
        """
        setup = self._setup(train_loss_fn, val_loss_fn)
        return single.hypergradient(
            setup, state, train_batch, val_batch, with_metadata=with_metadata
        )

    def start_episode(self, state: BilevelState) -> BilevelState:
        """For a loop of your own around `step`: fresh slots and memory, phi kept.

        Warns:
            GradhpoWarning: (an error if strict) `step` does not know where the episode began, so
                the hypergradient lacks the part of hyperparameters that enter the start.
        """
        method, problem = self.method(), problem_of(self, None, None)
        begun = episodes.start_episode(method, problem, state)
        if begun.origin is not None:
            moved = episodes.started(method, problem, begun.origin, state.hyperparams)
            complain(
                f"{type(self).__name__}: the start of an episode depends on hyperparameters' leaf "
                f"{', '.join(moved)}, but step does not know where the episode began, so its "
                "hypergradient lacks alpha_0 ds_0/dlam. Use run, which adds it; or gradhpo."
                "bilevel_step, which takes the origin of the episode (docs/starts.md).",
                self.strict,
            )
        return begun.state

    def end_episode(self, state: BilevelState, lr_reptile: float = 1.0) -> BilevelState:
        """For a loop of your own: move from phi towards w_T (1: go on from w_T; 0: restart)."""
        lr_reptile = check_fraction("lr_reptile", lr_reptile)
        if lr_reptile != 1 and not jax.tree.leaves(state.phi):
            raise ValueError("end_episode needs a state that start_episode has seen.")
        return episodes.end_episode(state, lr_reptile, self.tasks)

    # -- a whole run ------------------------------------------------------------------------

    def run(
        self,
        state: BilevelState,
        M: int,
        *,
        T: int | None = None,
        of: int | None = None,
        get_train_batch: BatchSource | None = None,
        get_val_batch: BatchSource | None = None,
        get_task: Callable[[], Any] | None = None,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_reptile: float = 1.0,
        lr_hyper: float | None = None,
        callback: Callable[[int, BilevelState], Any] | None = None,
        logger: MetricLogger | None = None,
        natural: Callable[[Hyper], Any] | None = None,
        progress: bool | None = None,
        on_failure: OnFailure = "skip",
        checkpoint: CheckpointArgument = None,
    ) -> BilevelState:
        """M episodes of T inner steps, the hyperparameters tuned all along.

        Every episode starts with fresh optimizer slots and a fresh memory (theta and keys
        survive). It draws exactly T train and T validation batches, alternately and in order, so
        all methods see the same batches from the same sources. This is `gradhpo.tune` for a class;
        the arguments not explained here are explained there.

        Args:
            state: From `init` or an earlier run, or `error.state` of one that was interrupted; it
                stays valid.
            M: Episodes of this run.
            T: Inner steps per episode; overrides the constructor's.
            of: `run(M=4)` is `run(M=2, of=4)` twice, bit for bit.
            get_train_batch, get_val_batch: Functions of no argument returning one batch,
                `gradhpo.Resident` or `gradhpo.InOrder` data sets; left out where `begin` returns
                the batches. All batches of one shape.
            train_loss_fn, val_loss_fn: `(params, hyperparams, batch) -> scalar`.
            lr_reptile: Where the next episode starts: 1 at w_T, 0 where this one did.
            lr_hyper: Outer rate, in episode m of this run `lr_hyper (1 - (m - 1) / M)`. Either
                this or `outer_optimizer`, which is never decayed.
            callback: `callback(episode, state)` after every episode, with `state.params = w_T`;
                False ends the run.
            get_task, logger, natural, progress, on_failure, checkpoint: See `gradhpo.tune`.

        Returns:
            The final state; its `params` are phi (equal to w_T at `lr_reptile=1`).

        Raises:
            TypeError, ValueError: at the first call, naming what is wrong and the remedy.
            UpdateRejected: with `on_failure="raise"`.

        Warns:
            GradhpoWarning: what `strict` lists; at the end, if updates of this run were rejected
                or many inaccurate (never an error: the state would be lost).
        """
        return checked_run(
            self._setup(train_loss_fn, val_loss_fn, run=True),
            state,
            Plan(M, self.T if T is None else T, of, lr_hyper, lr_reptile, on_failure),
            Data(get_train_batch, get_val_batch, get_task, self.tasks),
            callback=callback,
            logger=logger,
            natural=natural,
            progress=progress,
            checkpoint=checkpoint,
        )

    def _episode_length(self, T: int) -> int:
        return check_length(type(self).__name__, self.method(), T)

    def _setup(self, train_loss: LossFn, val_loss: LossFn, *, run: bool = False) -> Setup:
        """The method on a pair of losses, with what has been compiled for it.

        Args:
            run: A call of `run`, which compiles once for many episodes. A search over settings
                makes a new optimizer for each of its runs, so only new losses are worth a warning;
                and it is no error.
        """
        check_callable("train_loss_fn", train_loss, LOSS)
        check_callable("val_loss_fn", val_loss, LOSS)
        functions: dict[str, Any] = {"train_loss_fn": train_loss, "val_loss_fn": val_loss}
        if not run:
            own = ("update_fn", "inner_optimizer", "outer_optimizer")
            functions |= {name: getattr(self, name) for name in own}
        strict = self.strict and not run
        return found_again(setup_of, (self, train_loss, val_loss), functions, strict=strict)
