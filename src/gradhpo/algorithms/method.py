"""What is known of a method by its name: an entry per method, read by all that list or try them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.core.estimator import Estimator
from gradhpo.core.types import Loop

__all__ = ["METHODS", "Example", "Method", "Summary", "register"]

Problem = str | Callable[[int], Any]
"""A problem of `gradhpo.testing.problems` by its name, or a function like those."""

NONE: Mapping[str, Any] = MappingProxyType({})


class Example(NamedTuple):
    """What the tests of every method do with this one."""

    problems: tuple[Problem, ...]  # where the contract is checked, one or two: each is ten programs
    exact_on: tuple[Problem | tuple[Problem, int], ...] = ()  # with more steps than one window
    not_exact_on: tuple[Problem | tuple[Problem, int], ...] = ()  # controls, where it must be off
    settings: Mapping[str, Any] = NONE  # there: small, and such that the claims hold
    of_class: Mapping[str, Any] = NONE  # in the tests of the class, whose episodes have four steps
    trained_by: Callable[[Any], Any] | None = None
    # there, by this optimizer of a learning rate; None: by any step, an `update_fn` too


class Summary(NamedTuple):
    """A row of the tables of methods; methods of one page share it."""

    title: str
    page: str  # of docs/methods, without its ending
    estimates: str
    memory: str
    exact: str  # when
    use: str  # for what
    remark: str = ""  # after the cost per inner step, which the estimator knows


class Method(NamedTuple):
    """A method, what its name settles, and how it is tried."""

    name: str
    optimizer: type[EstimatorOptimizer]
    factory: Callable[..., Estimator]  # which that class calls
    description: str  # a line
    example: Example
    summary: Summary | None = None  # None: in no table
    settings: Mapping[str, Any] = NONE  # that the name stands for
    needs: tuple[str, ...] = ()  # settings that have to fit the problem
    most_unroll_steps: float = 0  # what `unroll_steps` may be in a run of T; 0: leave it alone
    usual: bool = False  # one of those that `check_hypergradient` runs by itself

    def make(self, **settings: Any) -> EstimatorOptimizer:
        """The method's optimizer with these settings and those of its name."""
        return self.optimizer(**{**self.settings, **settings})

    def over(self, T: int, **settings: Any) -> EstimatorOptimizer:
        """As `make`, for a run of T inner steps in the fewest windows it may take."""
        if self.most_unroll_steps:
            longest = int(min(T, self.most_unroll_steps))
            settings = {
                "unroll_steps": max(k for k in range(1, longest + 1) if T % k == 0),
                **settings,
            }
        return self.make(T=T, **settings)

    def estimator(self, T: int, loop: Loop = "scan", **settings: Any) -> Estimator:
        """The estimator as in `over`, for a problem that has its own training step."""
        return self.over(T, inner_optimizer=optax.identity(), **settings).estimator(loop)

    def tried(self) -> Estimator:
        """The estimator of the example."""
        return self.make(inner_optimizer=optax.identity(), **self.example.settings).estimator()


METHODS: dict[str, Method] = {}
"""Every method by name, in the order of registration."""


def register(method: Method) -> Method:
    """Make a method known by its name.

    From then on it is one of `gradhpo list` and of the studies, `check_hypergradient` takes its
    name, the tests of all methods (`gradhpo.testing.check_method`) try its example, and the tables
    of methods have its row.

    Args:
        method: The entry; see `Method`, `Example` and `Summary` for what stands in it.

    Returns:
        The same entry.

    Raises:
        ValueError: the name is taken, or something is missing; the message says what.
        TypeError: the class is not an `EstimatorOptimizer`; or what its constructor raises.

    >>> register(METHODS["reverse"])
    Traceback (most recent call last):
    ...
    ValueError: a method named 'reverse' is registered already, by ReverseOptimizer: ...
    """
    name, optimizer, example = method.name, method.optimizer, method.example
    if name in METHODS:
        raise ValueError(
            f"a method named {name!r} is registered already, by "
            f"{METHODS[name].optimizer.__name__}: give yours another name, or `del "
            f"METHODS[{name!r}]` first."
        )
    if not (isinstance(optimizer, type) and issubclass(optimizer, EstimatorOptimizer)):
        raise TypeError(
            f"the method {name!r} needs a class of gradhpo.algorithms.EstimatorOptimizer, got "
            f"{optimizer!r}."
        )
    missing = [field for field in ("name", "description") if not getattr(method, field)]
    missing += [] if example.problems else ["example.problems, where its contract is checked"]
    if not (example.exact_on or example.not_exact_on):
        missing.append("example.exact_on, where it is exact, or example.not_exact_on, a control")
    for setting in method.needs:
        for field in ("settings", "of_class"):
            if setting not in getattr(example, field):
                missing.append(f"{setting!r} in example.{field}, because it is in needs")
    if not missing and method.tried().price is None:
        missing.append("the price of its estimator: Estimator(..., price=lambda size: Cost(...))")
    if missing:
        raise ValueError(f"the entry of the method {name!r} lacks {'; '.join(missing)}.")
    METHODS[name] = method
    return method
