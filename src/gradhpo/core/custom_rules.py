"""Functions in a loss whose derivative is a rule that somebody wrote.

`jax.custom_vjp` and `jax.custom_jvp` replace a derivative: by the same one, computed better,
or by another one on purpose (straight-through rounding, gradient reversal, clipped
gradients). With another one `jax.grad(loss)` is the gradient of no function, and its
derivative in the weights is not symmetric. Whatever uses that symmetry asks here first.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax

from gradhpo.utils._jaxpr import equations, inside

__all__ = ["custom_rules"]

KNOWN = tuple(Path(str(package.__file__)).parent for package in (jax, optax))
"""Packages whose `custom_jvp` rules are derivatives of what they stand beside (`jax.nn.relu`,
`logsumexp`, …), as their own tests check."""

CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_transpose_call", "linear_call")
"""Prefixes of the names of primitives that carry a rule."""


def custom_rules(function: Callable, *args: Any) -> list[str]:
    """Where the functions in `function(*args)` stand whose rule may be no derivative.

    The rules of JAX and Optax are left out; an empty list says that every derivative of
    `function` commutes with every other. Traces `function` once, computes nothing.

    >>> @jax.custom_jvp
    ... def rounded(x):
    ...     return jax.numpy.round(x)
    >>> rounded.defjvps(lambda dx, y, x: dx)  # straight through
    >>> [where.split(" at ")[0] for where in custom_rules(rounded, 1.5)]
    ['rounded']
    >>> custom_rules(jax.nn.relu, 1.5)
    []
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sorted({_source(e) for e in equations(jaxpr) if _custom(e) and not _known(e)})


def _custom(equation: Any) -> bool:
    return equation.primitive.name.startswith(CUSTOM)


def _source(equation: Any) -> str:
    """`name at file:line` of the function that has the rule; the primitive if that is not known."""
    bodies = list(inside(equation))
    about = getattr(bodies[0], "debug_info", None) if bodies else None
    return getattr(about, "func_src_info", None) or equation.primitive.name


def _known(equation: Any) -> bool:
    """Whether both the function and its rule are JAX's or Optax's own.

    A user may give a rule of their own to a function of JAX: `jax.custom_jvp(jnp.round)`.
    Then either the rule stands in their file, or (`defjvps`, whose rule is JAX's) the function
    is none that has a rule at home, or it has, and is called inside the new one.
    """
    source = _source(equation)
    rule = getattr(equation.params.get("jvp_jaxpr_fun"), "debug_info", None)
    rule_source = getattr(rule, "func_src_info", None) or ""
    if _package(rule_source) is None or not _has_rule_at_home(source):
        return False
    within = (e for body in inside(equation) for e in equations(body))
    return all(_source(e) != source for e in within if _custom(e))


def _has_rule_at_home(source: str) -> bool:
    """Whether `source` is the name of a `custom_jvp` in a module of a known package."""
    package = _package(source)
    if package is None:
        return False
    name, _, place = source.partition(" at ")
    path = Path(place.rpartition(":")[0]).relative_to(package.parent).with_suffix("")
    at_home = getattr(sys.modules.get(".".join(path.parts)), name, None)
    return any(isinstance(f, jax.custom_jvp) for f in _unwrapped(at_home))


def _package(source: str) -> Path | None:
    """The known package in whose folder `name at file:line` stands."""
    path = Path(source.partition(" at ")[2].rpartition(":")[0])
    return next((package for package in KNOWN if package in path.parents), None)


def _unwrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
