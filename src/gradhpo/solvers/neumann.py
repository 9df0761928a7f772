"""The Neumann series: matrix-vector products alone, or none at all."""

import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.solvers._system import Limited, Solver, extremes, judged, plus, unit
from gradhpo.utils.gradients import tree_dot, tree_l2_norm, tree_scale, tree_where
from gradhpo.utils.settings import check_count, check_number

__all__ = ["DIVERGED", "identity", "neumann"]

DIVERGED = 10.0  # norm of a term of the Neumann series, of which the first has 1


def neumann(terms: int = 20, step_size: float = 0.1) -> Solver:
    """`u = a sum_{j=0}^{K} alpha (I - a G)^j`: K products, K + 1 terms.

    Args:
        terms: K. The error of the operator is at most `(1 - a m)^(K+1) / m`, with m the
            smallest eigenvalue; as a truncated unroll, K is the number of steps less one.
        step_size: a, at most 1 / (largest eigenvalue); the inner learning rate is a good
            choice. With `2 / (largest eigenvalue)` or more the series diverges: it is cut off
            where a term is ten times alpha, and the update is refused.

    Source:
        Lorraine et al. (2020), algorithm 3; the last factor a is part of the result.
    """
    terms = check_count("terms", terms, minimum=0)
    a = check_number("step_size", step_size)
    if a <= 0:
        raise ValueError(f"step_size of a Neumann series must be positive, got {a:g}.")

    def solve(product, alpha, start, key, loop):
        del start, key
        b, scale = unit(alpha)

        def body(carry, _):
            v, p, (least, largest), converges = carry
            Gv = product(v)
            curvature = extremes(least, largest, tree_dot(v, Gv), tree_dot(v, v))
            new = plus(v, -a, Gv)
            converges &= tree_l2_norm(new) < DIVERGED  # False for NaN too
            v = tree_where(converges, new, v)
            return (v, tree_where(converges, optax.tree.add(p, v), p), curvature, converges), None

        infinity, zero = jnp.full_like(scale, jnp.inf), jnp.zeros_like(scale)
        carry = (b, b, (infinity, zero), jnp.asarray(True))
        if terms:  # under jax.disable_jit a scan needs a step
            carry, _ = lax.scan(body, carry, length=terms, unroll=True if loop != "scan" else 1)
        _, p, curvature, _ = carry
        x = tree_scale(a, p)
        return judged(product, b, x, scale, jnp.asarray(terms, jnp.int32), *curvature)

    return Limited(solve, terms)


def identity(step_size: float = 1.0) -> Solver:
    """`u = a alpha`: the curvature is taken for a multiple of the identity.

    T1-T2 as an implicit method; with `a` the inner learning rate it is the one-step method
    at the minimum, and the Neumann series without iterations. a must be below 2 / (largest
    eigenvalue) for a residual below 1, above which the update is refused.

    Source:
        Luketina et al. (2016); Choe et al. (2023).
    """
    return neumann(0, step_size)
