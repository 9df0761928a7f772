"""The one body of `init`, `step`, `compute_hypergradient` and `run`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradhpo.algorithms._findings import complain_of, complain_of_rejections, inspect, resolve
from gradhpo.algorithms._programs import Programs, dynamics_of, initializer, problem_of, programs
from gradhpo.algorithms._recompilation import note_compilation, note_shapes
from gradhpo.core import loop as loops
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.dynamics import is_optimizer
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.outer import Outer, check_outer
from gradhpo.core.problem import Begin, BilevelProblem, Window, check_window
from gradhpo.core.source import BatchSource, Resident, as_arrays, check_source, draw, fetch, owned
from gradhpo.core.state import BilevelState
from gradhpo.core.step import with_metrics
from gradhpo.core.types import Batch, Hyper, LossFn, MakeOptimizer, Params, PyTree, UpdateFn
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import avals
from gradhpo.utils.validation import (
    check_batch,
    check_callable,
    check_choice,
    check_count,
    check_fraction,
    check_hyperparams,
    check_outer_step,
    check_params,
)

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
        self.estimator()  # refuses bad settings

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
            if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
                self._settle(**{field.name: value.item()})

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
        """The estimator, over `tasks` if there are any."""
        estimator = self.estimator(loop)
        return estimator if self.tasks is None else over_tasks(estimator, self.tasks)

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
            TypeError: a leaf has the wrong type; the message names it.
        """
        check_params(params)
        check_hyperparams(hyperparams)
        window = None
        if train_batch is not None:
            train = jax.tree.map(lambda x: jnp.asarray(x)[None], as_arrays(train_batch))
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
        check_outer_step(type(self).__name__, self.outer_optimizer, lr_hyper)
        state, train_batch, val_batch = self._check_call(state, train_batch, val_batch)
        rate = _rate(lr_hyper, scalar_dtype(state.hyperparams))
        compiled = self._noted(train_loss_fn, val_loss_fn, self.loop)
        if not compiled.findings:
            check_batch("train_batch", train_batch)
            check_batch("val_batch", val_batch)
            problem = problem_of(self, train_loss_fn, val_loss_fn)
            batch = jax.eval_shape(
                lambda: jax.tree.map(jnp.asarray, Window(train_batch, val_batch))
            )
            window = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((self.method().window, *x.shape), x.dtype), batch
            )
            compiled.findings.append(inspect(self, problem, state, window))
        state = with_metrics(state, compiled.findings[0].metrics)
        return compiled.step(state, train_batch, val_batch, rate)

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Hyper:
        """The very hypergradient that `step` would apply; the state is untouched."""
        state, train_batch, val_batch = self._check_call(state, train_batch, val_batch)
        compiled = self._noted(train_loss_fn, val_loss_fn, self.loop)
        return compiled.hypergradient(state, train_batch, val_batch)

    def start_episode(self, state: BilevelState) -> BilevelState:
        """For a loop of your own around `step`: fresh slots and memory, phi kept."""
        problem = BilevelProblem(dynamics_of(self, None), None, begin=self.begin)  # type: ignore[arg-type]
        return loops.start_episode(self.method("scan"), problem, state).state

    def end_episode(self, state: BilevelState, lr_reptile: float = 1.0) -> BilevelState:
        """For a loop of your own: move from phi towards w_T (1: go on from w_T; 0: restart)."""
        lr_reptile = check_fraction("lr_reptile", lr_reptile)
        if lr_reptile != 1 and not jax.tree.leaves(state.phi):
            raise ValueError("end_episode needs a state that start_episode has seen.")
        return loops.end_episode(state, lr_reptile, self.tasks)

    # -- a whole run ------------------------------------------------------------------------

    def run(
        self,
        state: BilevelState,
        M: int,
        *,
        T: int | None = None,
        get_train_batch: BatchSource,
        get_val_batch: BatchSource,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_reptile: float = 1.0,
        lr_hyper: float | None = None,
        callback: Callable[[int, BilevelState], Any] | None = None,
    ) -> BilevelState:
        """M episodes of T inner steps, the hyperparameters tuned all along.

        Every episode starts with fresh optimizer slots and a fresh memory (theta and keys
        survive) and is one compiled call. It draws exactly T train and T validation batches,
        alternately and in order, so all methods see the same batches from the same sources.

        Args:
            state: From `init` or an earlier run; it stays valid.
            M: Episodes; callbacks count them from 1.
            T: Inner steps per episode; overrides the constructor's.
            get_train_batch, get_val_batch: Functions of no argument returning one batch, or
                `gradhpo.Resident` data sets. All batches of one shape.
            train_loss_fn, val_loss_fn: `(params, hyperparams, batch) -> scalar`.
            lr_reptile: Where the next episode starts: 1 at w_T, 0 where this one did.
            lr_hyper: Outer rate in episode m is `lr_hyper (1 - (m - 1) / M)`. Either this or
                `outer_optimizer`, which is never decayed.
            callback: `callback(m, state)` after every episode, with `state.params = w_T`.

        Returns:
            The final state; its `params` are phi (equal to w_T at `lr_reptile=1`).

        Raises:
            TypeError, ValueError: at the first call, naming what is wrong and the remedy.

        Warns:
            GradhpoWarning: what `strict` lists; at the end, if more than half of the updates of
                this run were rejected (never an error: the state would be lost).
        """
        M = check_count("M", M)
        T = self._episode_length(T)
        check_outer_step(type(self).__name__, self.outer_optimizer, lr_hyper)
        lr_hyper = None if lr_hyper is None else float(lr_hyper)
        lr_reptile = check_fraction("lr_reptile", lr_reptile)
        check_source("get_train_batch", get_train_batch)
        check_source("get_val_batch", get_val_batch)
        if callback is not None:
            check_callable("callback", callback, "(episode, state)")
        _check_state(state)
        problem = self._cached(problem_of, train_loss_fn, val_loss_fn)

        keep_phi = lr_reptile != 1
        sources = (get_train_batch, get_val_batch)
        resident = Window(*(s.data if isinstance(s, Resident) else None for s in sources))
        dtype = scalar_dtype(state.hyperparams)
        estimator = self.method("scan")
        rejected = int(state.metadata["n_rejected"])
        taken = int(state.step) * estimator.window  # inner steps, so that all methods agree
        loop, compiled, fit, drawn, shapes = "scan", None, None, None, resident
        seen: set[Any] = set()
        for m in range(1, M + 1):
            window = draw(get_train_batch, get_val_batch, taken + (m - 1) * T, T)
            rate = None if lr_hyper is None else _rate(lr_hyper * (1 - (m - 1) / M), dtype)
            if avals(window) != drawn:
                drawn = avals(window)
                shapes = jax.eval_shape(fetch, resident, window)
                note_shapes(self, seen, shapes, strict=False)  # the state so far would be lost
                if estimator.room is not None:
                    state = state.update(memory=estimator.room.make(state.memory, shapes))
            if compiled is None or fit is None:
                state = _copy(state)
                findings = inspect(self, problem, state, shapes)
                complain_of(self, findings)
                state = with_metrics(state, findings.metrics)
                loop = resolve(self.loop, findings)
                compiled = self._noted(train_loss_fn, val_loss_fn, loop, run=True)
                # A host loop for its own sake is one over the updates; the fit needs none.
                inside = loop if findings.convolves else resolve("auto", findings)
                fit = self._cached(programs, train_loss_fn, val_loss_fn, inside).prepare_episode
            if estimator.start is not None and (m - 1) % self.estimation_interval == 0:
                state = fit(state, window, None, resident)
            state = self._episode(compiled, loop, state, window, rate, resident, keep_phi)
            if callback is not None:
                callback(m, _copy(state))
            if keep_phi or self.tasks:
                state = _end_episode(state, lr_reptile, tasks=self.tasks)
        complain_of_rejections(self, state, rejected, M * T // estimator.window)
        return state

    def _episode(
        self,
        compiled: Programs,
        loop: Loop,
        state: BilevelState,
        window: Window,
        rate: Any,
        resident: Window,
        keep_phi: bool,
    ) -> BilevelState:
        if loop != "host":
            return compiled.episode(state, window, None, rate, resident, keep_phi=keep_phi)
        state, origin, _ = compiled.start_episode(state, None, keep_phi=keep_phi)
        state = _copy(state)
        windows = loops.in_windows(window, self.method(loop).window)
        for i in range(jax.tree.leaves(windows)[0].shape[0]):
            part = jax.tree.map(lambda x: x[i], windows)  # noqa: B023
            state = compiled.window_step(state, part, rate, resident, origin)
            origin = None
        return loops.finished(state, check_window(window))

    # -- what the above share ---------------------------------------------------------------

    def _noted(
        self, train_loss: LossFn, val_loss: LossFn, loop: Loop, *, run: bool = False
    ) -> Programs:
        """The programs, with a warning when call after call brings new functions."""
        before = programs.cache_info().misses
        compiled = self._cached(programs, train_loss, val_loss, loop)
        missed = programs.cache_info().misses > before
        note_compilation(self, train_loss, val_loss, missed, run=run)
        return compiled

    def _cached(self, make: Callable, train_loss: LossFn, val_loss: LossFn, *loop: Loop) -> Any:
        check_callable("train_loss_fn", train_loss, LOSS)
        check_callable("val_loss_fn", val_loss, LOSS)
        try:
            return make(self, train_loss, val_loss, *loop)
        except TypeError as error:
            if "unhashable" in str(error):
                error.add_note(
                    "gradhpo: settings and losses are static under jit and must be hashable; wrap "
                    "the one that is not in a function."
                )
            raise

    def _episode_length(self, T: int | None) -> int:
        T = self.T if T is None else check_count("T", T)
        window = self.method("scan").window
        if T is None:
            raise ValueError(
                f"{type(self).__name__} does not know how many inner steps an episode has: give "
                "T= to the constructor or to run (T=20, say)."
            )
        if T % window:
            raise ValueError(
                f"T must be a multiple of the {window} steps this method unrolls, got T={T}."
            )
        return T

    def _check_call(self, state: Any, train_batch: Batch, val_batch: Batch):
        _check_state(state)
        train_batch, val_batch = owned(train_batch), owned(val_batch)
        room = self.method("scan").room
        if room is not None and room.missing(state.memory):
            if any(isinstance(x, Tracer) for x in jax.tree.leaves((state, train_batch))):
                raise ValueError(
                    f"{type(self).__name__} keeps a batch in its memory, whose shape must be known "
                    "before step is traced by jit, vmap or scan: make the state by "
                    "init(params, hyperparams, train_batch)."
                )
            one = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)), jnp.result_type(x)), train_batch
            )
            state = state.update(memory=room.make(state.memory, Window(one, ())))
        return state, train_batch, val_batch


def _check_state(state: Any) -> None:
    if not isinstance(state, BilevelState):
        raise TypeError(f"state must be a BilevelState from init, got {type(state).__name__}.")


def _rate(lr_hyper: Any, dtype: Any) -> Any:
    """One dtype whatever the user passes, so that every value is the same program."""
    if lr_hyper is None:
        return None
    if isinstance(lr_hyper, jax.Array):
        return lr_hyper if lr_hyper.dtype == dtype else lr_hyper.astype(dtype)
    return np.asarray(lr_hyper, dtype)


@jax.jit
def _copy(state: BilevelState) -> BilevelState:
    """Buffers of their own for every leaf: a run donates its state, the caller keeps theirs."""
    return jax.tree.map(jnp.copy, state)


_end_episode = jax.jit(loops.end_episode, static_argnames="tasks")
