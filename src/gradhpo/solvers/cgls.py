"""Least squares for a G that need not be symmetric: conjugate gradients on the normal equations.

    x <- x + a p,   r <- r - a p G,   s = r G',   p <- s + b p,   r = alpha - x G

`s` is the gradient of `|alpha - x G|^2 / 2`, up to its sign. All p, and so x, lie in the range of
G': x goes to the least-squares solution of smallest norm, also where G is singular, and the
residual never grows. Hestenes & Stiefel (1952), section 10; Björck (1996), "Numerical Methods for
Least Squares Problems", section 7.4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.solvers._system import (
    NOISE,
    Limited,
    Solver,
    check_damping,
    check_tolerance,
    damped,
    judged,
    plus,
    rounding,
    unit,
)
from gradhpo.utils.gradients import tree_l2_norm
from gradhpo.utils.settings import check_count

__all__ = ["cgls"]


class _Carry(NamedTuple):
    x: Any
    r: Any  # alpha - x G
    p: Any  # the next direction, over `normal`
    normal: jax.Array  # |r G'|
    size: jax.Array  # largest |p G| / |p|, of the size of |G|
    k: jax.Array


def cgls(tolerance: float = 1e-8, max_iterations: int = 100, damping: float = 0.0) -> Solver:
    """Least squares for any `G + damping I`, symmetric or not.

    Args:
        tolerance: Relative residual to stop at; of the normal equations where no u solves the
            system. Eight units of rounding where that is more (1e-6 in float32).
        max_iterations: At most so many, of one product and one with the transpose each.
        damping: rho.

    The answer is alpha times the pseudo-inverse of G. The iterations needed grow like the condition
    number of G: for a regular G `gmres` takes fewer products. JAX must be able to transpose the
    product, which it cannot where that has a `while_loop`. Its loop is a compiled one, which
    convolutions on CPU are slow in. Memory: four trees of weights, and what two products need. It
    starts from zero at every update, as `minres` does.

    >>> G = jnp.array([[0.0, 2.0], [0.0, 0.0]])
    >>> found = cgls()(lambda u: u @ G, jnp.ones(2), None, jax.random.key(0), "scan")
    >>> print(jnp.round(found.u, 4), found.least_squares)
    [0.5 0. ] True
    """
    tolerance = check_tolerance("cgls", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    damping = check_damping(damping)

    def solve(product, alpha, start, key, loop):
        del start, key, loop
        product = damped(product, damping)
        b, scale = unit(alpha)
        eps = rounding(b, product)
        goal = max(tolerance, 8 * eps)
        transposed = jax.linear_transpose(product, b)

        def best(at: _Carry):
            """Whether what is left of r G' is rounding, so that no direction leaves less."""
            noise = max(tolerance, NOISE * eps)
            return at.normal <= noise * at.size * tree_l2_norm(at.r)

        def going(at: _Carry):
            wanted = (tree_l2_norm(at.r) > goal) & ~best(at)
            return wanted & jnp.isfinite(at.normal) & (at.k < max_iterations)

        def body(at: _Carry):
            pG, length = unit(product(at.p))
            ahead = at.normal / length
            r = plus(at.r, -ahead, pG)
            s, normal = unit(transposed(r)[0])
            return _Carry(
                x=plus(at.x, ahead / length, at.p),
                r=r,
                p=plus(s, normal / at.normal, at.p),
                normal=normal,
                size=jnp.maximum(at.size, length / tree_l2_norm(at.p)),
                k=at.k + 1,
            )

        p, normal = unit(transposed(b)[0])
        normal = normal * tree_l2_norm(p)  # 0 where p is
        zeros = jax.tree.map(jnp.zeros_like, b)
        at = _Carry(zeros, b, p, normal, normal, jnp.zeros((), jnp.int32))
        at = lax.while_loop(going, body, at)
        products = 2 * at.k + 1
        found = judged(product, b, at.x, scale, products, jnp.full_like(normal, jnp.inf), at.size)
        # The claim rests on recurrences; it holds if the residual computed anew is theirs.
        kept = found.residual <= 1.01 * tree_l2_norm(at.r) + eps * at.size * tree_l2_norm(at.x)
        return found._replace(least_squares=best(at) & kept)

    return Limited(solve, 2 * max_iterations + 1)
