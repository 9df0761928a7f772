"""Conjugate gradients, for a positive definite system."""

import jax.numpy as jnp

from gradhpo.solvers._system import (
    Limited,
    Solver,
    check_damping,
    check_tolerance,
    damped,
    extremes,
    from_start,
    judged,
    plus,
    rounding,
    unit,
    while_loop,
)
from gradhpo.utils.gradients import tree_dot, tree_scale, tree_where
from gradhpo.utils.settings import check_count

__all__ = ["cg"]


def cg(tolerance: float = 1e-6, max_iterations: int = 100, damping: float = 0.0) -> Solver:
    """Conjugate gradients on `H + damping I`, from a warm start.

    Args:
        tolerance: Relative residual to stop at.
        max_iterations: At most so many products.
        damping: rho. 0 for strongly convex losses, 1e-3 to 1 for networks.

    For a positive definite G. Stops at a direction p without curvature, `p G p <= 0`, which the
    minimum of a strongly convex loss does not have, and returns the iterate of the smallest
    residual, the start and zero among them. With a singular G that is rarely a solution: take
    `minres`. At most P products in exact arithmetic. Memory: six trees of weights.
    Where compiled loops are slow (convolutions on CPU) all `max_iterations` are written out and
    run: set it to what is needed.

    Source:
        Hestenes & Stiefel (1952); Pedregosa (2016) for hypergradients.
    """
    tolerance = check_tolerance("cg", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    damping = check_damping(damping)

    def solve(product, alpha, start, key, loop):
        del key
        product = damped(product, damping)
        b, scale = unit(alpha)
        x, r = from_start(product, b, tree_scale(1 / scale, start))
        rr = tree_dot(r, r)
        infinity, zero = jnp.full_like(rr, jnp.inf), jnp.zeros_like(rr)
        first = (x, r, r, rr, (x, rr), (infinity, zero), jnp.zeros((), jnp.int32))

        def curved(curvature, largest):
            return curvature > rounding(b, product) * largest  # False for NaN too

        def going(carry):
            _, _, _, rr, _, curvature, k = carry
            # ||r|| <= sqrt(condition number) ||b||: beyond that the system is singular.
            sound = (rr < 1 / jnp.finfo(rr.dtype).eps) & curved(*curvature)
            return (rr > tolerance**2) & sound & (k < max_iterations)

        def body(carry):
            x, r, p, rr, (best, smallest), (least, largest), k = carry
            Gp = product(p)
            pGp = tree_dot(p, Gp)
            pp = tree_dot(p, p)
            least, largest = extremes(least, largest, pGp, pp)
            good = curved(pGp, largest * pp)
            step = jnp.where(good, rr / jnp.where(good, pGp, 1), 0)
            x, r = plus(x, step, p), plus(r, -step, Gp)
            rr, before = tree_dot(r, r), rr
            better = rr < smallest
            best = tree_where(better, x, best), jnp.where(better, rr, smallest)
            return x, r, plus(r, rr / before, p), rr, best, (least, largest), k + 1

        *_, (x, _), curvature, k = while_loop(going, body, first, max_iterations, loop)
        return judged(product, b, x, scale, k, *curvature)

    return Limited(solve, max_iterations, checks=2)
