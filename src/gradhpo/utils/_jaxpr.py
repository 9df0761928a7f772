"""Walking the equations of a traced program."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

__all__ = ["equations", "inside", "needed"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of the loops, branches and calls in it included.

    >>> jaxpr = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, jax.numpy.sin, lambda x: x, x))(1.0)
    >>> "sin" in [equation.primitive.name for equation in equations(jaxpr.jaxpr)]
    True
    """
    for equation in jaxpr.eqns:
        yield equation
        for body in inside(equation):
            yield from equations(body)


def inside(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    values = tuple(equation.params.values())
    for value in jax.tree.leaves(values, is_leaf=lambda v: hasattr(v, "eqns")):
        body = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds a jaxpr
        if hasattr(body, "eqns"):
            yield body


def needed(jaxpr: Any, outputs: list[bool] | None = None) -> tuple[Any, list[bool]]:
    """The part of a jaxpr that some of its outputs depend on, all of them by default.

    Returns:
        The jaxpr without the other equations, and which of its inputs are left.

    >>> jaxpr = jax.make_jaxpr(lambda x, y: (x + 1, y + 1))(1.0, 2.0).jaxpr
    >>> needed(jaxpr, [True, False])[1]
    [True, False]
    """
    return partial_eval.dce_jaxpr(jaxpr, outputs or [True] * len(jaxpr.outvars))
