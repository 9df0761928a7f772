"""The registered methods, each put through the contract on the problems of its own example."""

from typing import Any

from gradhpo.algorithms.method import Method
from gradhpo.testing import problems
from gradhpo.testing.conformance import check_estimator

__all__ = ["check_method"]


def check_method(method: Method, *, rtol: float = 1e-8) -> None:
    """Put the example of a registered method through `check_estimator`.

    Args:
        method: An entry of `gradhpo.algorithms.METHODS`, whose `example` says where the method is
            exact, where it must not be, and where the rest of the contract is checked. Float64 must
            be switched on.
        rtol: Relative error allowed where it is exact.

    Raises:
        AssertionError: the first breach.
        ValueError: a problem has an unknown name.
    """
    example = method.example
    check_estimator(
        method.tried(),
        exact_on=[_case(x) for x in example.exact_on],
        not_exact_on=[_case(x) for x in example.not_exact_on],
        problems=[_case(x) for x in example.problems],
        rtol=rtol,
    )


def _case(problem: Any) -> Any:
    """Names made functions."""
    if isinstance(problem, tuple):
        return _case(problem[0]), problem[1]
    if not isinstance(problem, str):
        return problem
    if problem not in problems.__all__:
        raise ValueError(f"gradhpo.testing.problems has no problem {problem!r}.")
    return getattr(problems, problem)
