"""Arithmetic of a program, counted in its jaxpr.

XLA's own count takes the body of a loop once, however long the loop is. Here loops are
multiplied out, equations that no output depends on are left out, and equal equations count
once; fusion is not known.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradhpo.utils._jaxpr import inside, needed

__all__ = ["arithmetic"]

_MOVES = set(
    "broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice gather iota "
    "dynamic_update_slice pad reshape rev select_n slice squeeze stop_gradient transpose".split()
)


def arithmetic(closed: Any) -> np.ndarray:
    """`[fixed, per iteration]`: floating-point operations of a closed jaxpr.

    The second number is that of loops whose length only the run decides (solvers).

    >>> import jax
    >>> x = jnp.ones((2, 3))
    >>> arithmetic(jax.make_jaxpr(lambda x: x @ x.T)(x)).tolist()
    [24.0, 0.0]
    """
    return _count(needed(closed.jaxpr)[0])


def _count(jaxpr: Any) -> np.ndarray:
    total = np.zeros(2)
    seen, first = {}, {}  # equal equations are computed once, as the compiler does
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs = [str(v) if hasattr(v, "val") else first.get(v, v) for v in equation.invars]
        key = name, tuple(inputs), str(params)
        if key in seen:
            first.update(zip(equation.outvars, seen[key], strict=True))
            continue
        seen[key] = equation.outvars
        bodies = [_count(body) for body in inside(equation)]
        if name == "scan":
            total += params["length"] * sum(bodies)
        elif name == "while":
            total[1] += np.sum(bodies)
        elif name == "cond":
            total += np.max(bodies, axis=0)
        elif bodies:
            total += sum(bodies)
        else:
            total[0] += _operations(name, params, equation)
    return total


def _operations(name: str, params: Mapping[str, Any], equation: Any) -> float:
    out, *_ = (v.aval for v in equation.outvars)
    sizes = [getattr(v.aval, "size", 0) for v in equation.invars]
    if name in _MOVES or not jnp.issubdtype(out.dtype, jnp.floating):
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out.size * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2.0 * out.size * kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return float(max([out.size, *sizes]) if name.startswith("reduce") else out.size)
