"""The task: all that says what is tuned, in one object, whatever the method.

task = Task(problem, params, hyperparams, train=..., val=...)
print(check_hypergradient(task, steps=20))
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.core.dynamics import InnerState
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import BatchSource, Resident, check_source, draw, fetch
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.step import strengthen
from gradhpo.core.types import Batch, Hyper, Params, PyTree
from gradhpo.utils.validation import (
    check_callable,
    check_hyperparams,
    check_params,
    check_same_structure,
)

__all__ = ["Task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A bilevel problem with a place to start and data to use.

    Attributes:
        problem: Dynamics, losses, and how an episode begins.
        params: Weights to start from.
        hyperparams: Hyperparameters to start from; every leaf floating point.
        train, val: Sources of batches: functions of no argument, `gradhpo.Resident` or
            `gradhpo.InOrder`. None where `problem.begin` brings the batches.
        model_state: Of losses that have one, see `gradhpo.core.losses`.
        bounds: `(lowest, highest)`, trees like `hyperparams`, in the units they are stored in.
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
    bounds: tuple[Hyper, Hyper] | None = None
    natural: Callable[[Hyper], dict[str, Any]] | None = None
    test: Batch | None = None

    def __post_init__(self) -> None:
        check_params(self.params)
        check_hyperparams(self.hyperparams)
        for name, source in (("train", self.train), ("val", self.val)):
            if source is not None:
                check_source(name, source)
            elif self.problem.begin is None:
                raise ValueError(
                    f"the task has no {name} data: give {name}=, a source of batches, or a problem "
                    "whose begin returns them with the start."
                )
        if self.bounds is not None:
            for bound in self.bounds:
                check_same_structure("a bound of the hyperparameters", self.hyperparams, bound)
        if self.natural is not None:
            check_callable("natural", self.natural, "hyperparams -> dictionary")

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
        """
        origin = self.origin(key)
        inner, window = begin_episode(self.problem, origin, strengthen(self.hyperparams))
        if window is None:
            window = self.window(steps)
        return strengthen(inner), window

    def window(self, steps: int) -> Window:
        """So many batches of either kind, from the sources."""
        assert self.train is not None and self.val is not None
        resident = Window(
            *(s.data if isinstance(s, Resident) else None for s in (self.train, self.val))
        )
        window = draw(self.train, self.val, 0, steps)
        return jax.tree.map(jnp.asarray, fetch(resident, window))
