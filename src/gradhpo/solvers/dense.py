"""The system as a matrix, factorised: the reference of the other solvers."""

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gradhpo.solvers._system import (
    Solver,
    check_damping,
    damped,
    judged,
    rounding,
    rows,
    spectrum,
    unit,
)

__all__ = ["dense"]


def dense(damping: float = 0.0) -> Solver:
    """Materialise `G` by P products and factorise it; for some two thousand weights at most.

    The reference of the others: the least-squares solution of smallest norm, singular values
    below `10 sqrt(P)` units of rounding of the largest taken for zero. Also for `G` that is not
    symmetric.
    """
    damping = check_damping(damping)

    def solve(product, alpha, start, key, loop):
        del start, key, loop
        product = damped(product, damping)
        b, scale = unit(alpha)
        flat, unravel = ravel_pytree(b)
        G = rows(product, unravel, flat, jnp.arange(flat.size))
        cutoff = 10 * rounding(b, product) * flat.size**0.5
        x, _, rank, _ = jnp.linalg.lstsq(G.T, flat, rcond=cutoff)
        k = jnp.asarray(flat.size, jnp.int32)
        found = judged(product, b, unravel(x), scale, k, *spectrum(G))
        singular = (rank < flat.size) & jnp.isfinite(found.residual)  # NaN has rank 0
        return found._replace(least_squares=singular)

    return solve
