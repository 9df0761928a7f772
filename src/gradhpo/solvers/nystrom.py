"""The inverse of a low-rank approximation from random columns."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gradhpo.solvers._system import Limited, Solver, damped, judged, rows, spectrum, unit
from gradhpo.utils.settings import check_count, check_number

__all__ = ["nystrom"]


def nystrom(rank: int = 10, damping: float = 0.1) -> Solver:
    """The inverse of a low-rank approximation of H, plus damping.

    With k random coordinates K, `C = H[:, K]` and `W = H[K, K]`, by Woodbury

        (C W^-1 C' + rho I)^-1 alpha = alpha / rho - C (W + C' C / rho)^-1 C' alpha / rho^2

    Args:
        rank: k; all coordinates where there are fewer weights. k products, all at once, no
            iteration.
        damping: rho, positive: 0.01 to 1. The formula cancels when it is tiny.

    Memory: k trees of weights, and a few more.

    Source:
        Hataya & Yamada (2023), eq. (6); the coordinates are drawn anew at every update.
    """
    rank = check_count("rank", rank)
    rho = check_number("damping", damping)
    if rho <= 0:
        raise ValueError(f"nystrom divides by damping; it must be positive, got {damping}.")

    def solve(product, alpha, start, key, loop):
        del start, loop
        b, scale = unit(alpha)
        flat, unravel = ravel_pytree(b)
        index = jax.random.permutation(key, flat.size)[:rank]
        C = rows(product, unravel, flat, index)  # k x P, the columns as rows
        W = C[:, index]
        # Singular where H has a rank below k, and consistent all the same.
        small = jnp.linalg.lstsq(W + C @ C.T / rho, C @ flat)[0]
        x = unravel(flat / rho - small @ C / rho**2)
        k = jnp.asarray(index.size, jnp.int32)
        return judged(damped(product, rho), b, x, scale, k, *spectrum(W))

    return Limited(solve, rank)
