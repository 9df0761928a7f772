"""The task: all that says what is tuned, in one object, whatever the method.

task = Task(problem, params, hyperparams, train=..., val=...)
print(check_hypergradient(task, steps=20))
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.core.declared import Declared, bind, declared
from gradhpo.core.dynamics import InnerState
from gradhpo.core.episode import episode_data
from gradhpo.core.problem import BilevelProblem, Window, check_problem_type, check_window
from gradhpo.core.source import (
    BatchSource,
    Pool,
    check_pools,
    check_source,
    draw,
    fetch,
    resident,
)
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.step import strengthen
from gradhpo.core.types import Batch, Hyper, InnerOptimizer, Params, PyTree
from gradhpo.utils._precision import float64
from gradhpo.utils.settings import check_callable, check_count
from gradhpo.utils.validation import check_batch, check_start

__all__ = ["Task"]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A bilevel problem with a place to start and data to use.

    Numbers are kept as they are given: what is computed from them is as wide as JAX's types are
    then, 64 bits in `check_hypergradient`.

    Attributes:
        problem: Dynamics, losses, and how an episode begins.
        params: Weights to start from.
        hyperparams: Hyperparameters to start from; every leaf floating point.
        train, val: Sources of batches: functions of no argument, `gradhpo.Resident` or
            `gradhpo.InOrder`. None for both where `problem.begin` brings the batches, and
            `gradhpo.Pool` where it brings rows of these data.
        model_state: Of losses that have one, see `gradhpo.core.losses`.
        space: Where the hyperparameters may be, a tree of `gradhpo.spaces` like `hyperparams`, or a
            prefix of it. The losses, `hyperparams` and logs are in natural scale then; a state
            holds what is stored, see `values` and `settled`.
        natural: The hyperparameters as people know them, `natural(hyperparams) -> dictionary`:
            a rate for its logarithm. Logged by a run.
        test: Data that nothing is tuned on, for the last word.

    Raises:
        TypeError, ValueError: a part is not what it should be; the message names the leaf.

    >>> from gradhpo import InOrder, from_update
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    ... )
    >>> task = Task(problem, 2.0, 0.5, InOrder(jnp.ones(3)), InOrder(jnp.zeros(3)))
    >>> inner, window = task.begin(steps=3)
    >>> print(inner.params, window.train)
    2.0 [1. 1. 1.]
    """

    problem: BilevelProblem
    params: Params
    hyperparams: Hyper
    train: BatchSource | None = None
    val: BatchSource | None = None
    _: dataclasses.KW_ONLY
    model_state: PyTree = ()
    space: PyTree = None
    natural: Callable[[Hyper], dict[str, Any]] | None = None
    test: Batch | None = None

    def __post_init__(self) -> None:
        check_problem_type("a task", self.problem)
        with float64():  # that numbers are too wide for the types of a run, `begin` says
            check_start(self.params, self.hyperparams, self.model_state)
        self._check_sources()
        if self.space is not None:
            self.declared  # noqa: B018  refuses what is outside
        if self.natural is not None:
            check_callable("natural", self.natural, "hyperparams -> dictionary")
        if self.test is not None:
            check_batch("the test data of a task", self.test)

    def _check_sources(self) -> None:
        sources = {"train": self.train, "val": self.val}
        missing = [name for name, source in sources.items() if source is None]
        if missing and (len(missing) == 1 or self.problem.begin is None):
            raise ValueError(
                f"the task has no {' and no '.join(missing)} data: give "
                f"{' and '.join(f'{name}=' for name in missing)}, sources of batches, or neither "
                "train= nor val= and a problem whose begin returns the batches with the start."
            )
        for name, source in sources.items():
            if source is not None:
                check_source(name, source)
        check_pools(self.train, self.val, self.problem.begin)

    @functools.cached_property
    def declared(self) -> Declared | None:
        """The spaces of the hyperparameters, if there are any."""
        return None if self.space is None else declared(self.space, self.hyperparams)

    @property
    def stored(self) -> "Task":
        """The same task with hyperparameters as a state holds them; itself without a space.

        Made anew each time, as wide as JAX's types are then; the problem is the same one.
        """
        spaces, natural = self.declared, self.natural
        if spaces is None:
            return self
        return self.replace(
            problem=bind(self.problem, spaces),
            hyperparams=spaces.store(self.hyperparams),
            natural=spaces.value if natural is None else lambda lam: natural(spaces.value(lam)),
            space=None,
        )

    def values(self, hyperparams: Hyper) -> Hyper:
        """`state.hyperparams` in natural scale, as the losses saw them."""
        return hyperparams if self.declared is None else self.declared.value(hyperparams)

    def settled(self, hyperparams: Hyper) -> Hyper:
        """`state.hyperparams` as they are taken home: in natural scale, discrete ones decided."""
        return hyperparams if self.declared is None else self.declared.settle(hyperparams)

    def optimizer(self, hyperparams: Hyper) -> InnerOptimizer:
        """The Optax optimizer of training with these hyperparameters, to train with elsewhere.

        Args:
            hyperparams: In the scale of `self.hyperparams`, such as `task.settled(...)`.

        Raises:
            ValueError: the training step is a function of the user's own (`from_update`).
        """
        parts = self.problem.dynamics.parts
        if parts is None:
            raise ValueError(
                "this task trains by a step of its own (from_update), which has no Optax optimizer "
                "to hand out; call that step with the hyperparameters."
            )
        return parts.make_optimizer(hyperparams)

    def replace(self, **fields: Any) -> "Task":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def origin(self, key: Any = None) -> Origin:
        """What s_0 is made from beside the hyperparameters.

        Args:
            key: The draw for `problem.begin`; None: `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else key
        params, model_state = strengthen((self.params, self.model_state))
        return Origin(InnerState(params, (), model_state), key)

    def begin(self, steps: int, key: Any = None) -> tuple[InnerState, Window]:
        """`(s_0, window)`: the state that an episode of so many steps begins in, and its batches.

        Sources that are functions are called; the others start at their first batch.

        Args:
            steps: T, training steps.
            key: As in `origin`.

        Raises:
            TypeError: parameters or hyperparameters are wider than the types of JAX.
            ValueError: there are not so many batches, or the start brings another number of them.
        """
        steps = check_count("steps", steps)
        check_start(self.params, self.hyperparams, self.model_state)
        inner, own = begin_episode(self.problem, self.origin(key), strengthen(self.hyperparams))
        picked = self.train is None or isinstance(self.train, Pool)
        drawn = None if picked else self.window(steps)
        window, data = episode_data(drawn, own, resident(self.train, self.val))
        window = window if drawn is not None else fetch(data, window)
        if (length := check_window(window)) != steps:
            raise ValueError(
                f"the start of this task brings the batches of {length} steps, but {steps} are "
                f"asked for: ask for {length}."
            )
        return strengthen(inner), window

    def window(self, steps: int) -> Window:
        """So many batches of either kind, from the sources.

        Raises:
            ValueError: there are not so many, or no sources.
        """
        if self.train is None or self.val is None or isinstance(self.train, Pool):
            raise ValueError("this task has no sources: its batches come with begin(steps, key).")
        window = draw(self.train, self.val, 0, steps)
        return jax.tree.map(jnp.asarray, fetch(resident(self.train, self.val), window))
