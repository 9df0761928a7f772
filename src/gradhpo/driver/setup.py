"""What is run: a method on a problem with an outer update, all of it static."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer
from gradhpo.core.types import Batch
from gradhpo.utils.settings import check_count

__all__ = ["Loops", "Setup", "check_length", "check_state", "resolve"]


def _nothing(train_batch: Batch) -> tuple[str, ...]:
    del train_batch
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A method on a problem. Compiled programs and findings are kept on it, and go with it.

    Attributes:
        name: What messages call it.
        problem: Dynamics, losses, and how an episode begins.
        method: `method(loop)` is the estimator (over tasks, if there are any), its loops over
            steps run so.
        outer: An Optax optimizer, an `Outer`, or None for a plain rate.
        period: Episodes between two calls of `Estimator.start`.
        loop: "scan", "unroll", "host" or "auto".
        strict: Raise where others are warned.
        remarks: What the method has to say about the shapes of a train batch.
        settings: Of the method, by name, where it is an object that has some.
    """

    name: str
    problem: BilevelProblem
    method: Callable[[Loop], Estimator]
    outer: OuterOptimizer
    period: int = 1
    loop: str = "auto"
    strict: bool = False
    remarks: Callable[[Batch], tuple[str, ...]] = _nothing
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def estimator(self) -> Estimator:
        """For everything but its loops."""
        return self.remember("estimator", lambda: self.method("scan"))

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made at the first call with this key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def remember_shapes(self, function: Callable, *arguments: Any) -> Any:
        """What `function` says of these shapes: a second run with the same ones traces nothing."""
        shapes = jax.tree.map(_shape_of, arguments)
        leaves, structure = jax.tree.flatten(shapes)
        return self.remember((function, structure, *leaves), lambda: function(self, *shapes))


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """As `jax.eval_shape`, without a trace."""
    weak = getattr(x, "weak_type", isinstance(x, int | float | complex))
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), weak_type=weak)


class Loops(NamedTuple):
    """How a run loops."""

    episode: Loop  # over the windows of an episode
    window: Loop  # over the steps of a window; of "host" only if nothing is traced around it
    fit: Loop  # over the steps of an episode, in `Estimator.start`


def resolve(loop: str, convolves: bool) -> Loops:
    """What a setting means for this problem.

    On CPU a convolution inside a compiled loop is many times slower than outside, so "auto" keeps
    it out of there.

    >>> resolve("scan", convolves=True), resolve("host", convolves=False).fit
    (Loops(episode='scan', window='scan', fit='scan'), 'scan')
    """
    avoids = convolves and jax.default_backend() == "cpu"
    if loop == "auto":
        loop = "host" if avoids else "scan"
    if loop == "host":  # one compiled update, the steps of its window unrolled
        return Loops("host", "unroll", "host" if convolves else "scan")
    return Loops(loop, loop, loop)  # type: ignore[arg-type]


def check_state(state: Any) -> None:
    """A state from `init`.

    Raises:
        TypeError: something else.
    """
    if not isinstance(state, BilevelState):
        raise TypeError(f"state must be a BilevelState from init, got {type(state).__name__}.")


def check_length(name: str, estimator: Estimator, T: int | None) -> int:
    """The inner steps of an episode of this method.

    Raises:
        ValueError: nobody says how many, or windows do not fill them.
    """
    if T is None:
        raise ValueError(
            f"{name} does not know how many inner steps an episode has: give T= to "
            f"{'it' if name == 'tune' else 'the constructor or to run'} (T=20, say)."
        )
    T, window, lead = check_count("T", T), estimator.unroll_steps, estimator.lead
    if (T - lead) % window or T < lead + window:
        after = f"{lead} steps and " if lead else ""
        raise ValueError(
            f"T must be {after}a multiple of the {window} steps this method unrolls, got T={T}."
        )
    return T
