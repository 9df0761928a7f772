"""The generalised minimal-residual method, for an unsymmetric system."""

import jax
import jax.numpy as jnp
import optax

from gradhpo.solvers._system import (
    Limited,
    Solver,
    check_damping,
    check_tolerance,
    damped,
    from_start,
    judged,
    length,
    unit,
)
from gradhpo.utils.gradients import tree_is_finite, tree_scale, tree_where
from gradhpo.utils.settings import check_count

__all__ = ["gmres"]


def gmres(tolerance: float = 1e-6, max_iterations: int = 100, damping: float = 0.0) -> Solver:
    """`jax.scipy.sparse.linalg.gmres`, for an unsymmetric G, such as `I - A` of a fixed point.

    It does not say how often it took the product; `iterations` is the most it may have.
    Its loops are compiled ones, which convolutions on CPU are slow in. A singular system is solved
    where it has a solution; elsewhere the method breaks down, and what is left is u = 0, which
    `implicit` refuses: take `cgls`.
    """
    tolerance = check_tolerance("gmres", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    damping = check_damping(damping)
    restart = min(20, max_iterations)
    restarts = -(-max_iterations // restart)

    def solve(product, alpha, start, key, loop):
        del key, loop
        product = damped(product, damping)
        b, scale = unit(alpha)
        start, _ = from_start(product, b, tree_scale(1 / scale, start))
        x, _ = jax.scipy.sparse.linalg.gmres(
            product, b, start, tol=tolerance, restart=restart, maxiter=restarts
        )
        x = tree_where(tree_is_finite(x), x, optax.tree.zeros_like(x))
        k = jnp.asarray(restart * restarts, jnp.int32)
        size = length(product(b))  # of G, for the judge
        return judged(product, b, x, scale, k, jnp.full_like(size, jnp.inf), size)

    return Limited(solve, restart * restarts, checks=2)
