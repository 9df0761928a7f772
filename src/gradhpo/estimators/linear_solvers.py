"""Solvers of the linear system of implicit differentiation, `u G = alpha`.

`G` is known by its product `u -> u G` alone: the Hessian of the training loss, plus
damping, or `I - A` of a fixed point. Every solver is a function
`solve(product, alpha, start, key, loop) -> Solution`; what it found is judged by one more
product, so that a solver which fails cannot look like one that worked. `implicit` refuses an
update by a solution that leaves a larger residual than none would.

The right-hand side is scaled to norm 1 and tests are relative, so `cg` and `dense` without
damping give the same answer when a loss is multiplied by 1e-6 or 1e6; a damping or a step size
is in the units of the loss.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from gradhpo.estimators._linear_system import (
    Solution,
    Solver,
    check_damping,
    check_tolerance,
    damped,
    extremes,
    from_start,
    judged,
    length,
    plus,
    rounding,
    rows,
    unit,
    while_loop,
)
from gradhpo.estimators.cgls import cgls
from gradhpo.estimators.minres import minres
from gradhpo.utils.gradients import tree_dot, tree_is_finite, tree_l2_norm, tree_scale, tree_where
from gradhpo.utils.validation import check_count, check_number

__all__ = [
    "Solution",
    "Solver",
    "cg",
    "cgls",
    "dense",
    "gmres",
    "identity",
    "minres",
    "neumann",
    "nystrom",
]

DIVERGED = 10.0  # norm of a term of the Neumann series, of which the first has 1


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

    return solve


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

    return solve


def identity(step_size: float = 1.0) -> Solver:
    """`u = a alpha`: the curvature is taken for a multiple of the identity.

    T1-T2 as an implicit method; with `a` the inner learning rate it is the one-step method
    at the minimum, and the Neumann series without iterations. a must be below 2 / (largest
    eigenvalue) for a residual below 1, above which the update is refused.

    Source:
        Luketina et al. (2016); Choe et al. (2023).
    """
    return neumann(0, step_size)


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
        return judged(damped(product, rho), b, x, scale, k, *_spectrum(W))

    return solve


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
        found = judged(product, b, unravel(x), scale, k, *_spectrum(G))
        return found._replace(least_squares=rank < flat.size)

    return solve


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

    def solve(product, alpha, start, key, loop):
        del key, loop
        product = damped(product, damping)
        b, scale = unit(alpha)
        start, _ = from_start(product, b, tree_scale(1 / scale, start))
        restart = min(20, max_iterations)
        restarts = -(-max_iterations // restart)
        x, _ = jax.scipy.sparse.linalg.gmres(
            product, b, start, tol=tolerance, restart=restart, maxiter=restarts
        )
        x = tree_where(tree_is_finite(x), x, optax.tree.zeros_like(x))
        k = jnp.asarray(restart * restarts, jnp.int32)
        size = length(product(b))  # of G, for the judge
        return judged(product, b, x, scale, k, jnp.full_like(size, jnp.inf), size)

    return solve


def _spectrum(G: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest eigenvalue of the symmetric part, and the largest absolute one."""
    eigenvalues = jnp.linalg.eigvalsh((G + G.T) / 2)
    return eigenvalues[0], jnp.max(jnp.abs(eigenvalues))
