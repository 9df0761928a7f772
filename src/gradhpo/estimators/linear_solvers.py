"""Solvers of the linear system of implicit differentiation, `u G = alpha`.

`G` is known by its product `u -> u G` alone: the Hessian of the training loss, plus
damping, or `I - A` of a fixed point. Every solver is a function
`solve(product, alpha, start, key, loop) -> Solution`; what it found is judged by one more
product, so that a solver which fails cannot look like one that worked.

The right-hand side is scaled to norm 1 and tests are relative, so `cg` and `dense` without
damping give the same answer when a loss is multiplied by 1e-6 or 1e6; a damping or a step size
is in the units of the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from gradhpo.core.estimator import Loop
from gradhpo.utils.gradients import tree_dot, tree_l2_norm, tree_scale, tree_where
from gradhpo.utils.validation import check_count, check_number

__all__ = ["Solution", "Solver", "cg", "dense", "gmres", "identity", "neumann", "nystrom"]

Product = Callable[[Any], Any]
DIVERGED = 10.0  # norm of a term of the Neumann series, of which the first has 1


class Solution(NamedTuple):
    """An approximate solution of `u G = alpha` and how good it is."""

    u: Any
    iterations: jax.Array  # products spent on it, the check not counted
    residual: jax.Array  # |u G - alpha| / |alpha|, computed anew
    curvature: jax.Array  # smallest u G u / |u|^2 met; negative: G is indefinite


Solver = Callable[[Product, Any, Any, jax.Array, Loop], Solution]


def cg(tolerance: float = 1e-6, max_iterations: int = 100, damping: float = 0.0) -> Solver:
    """Conjugate gradients on `H + damping I`, from a warm start.

    Args:
        tolerance: Relative residual to stop at.
        max_iterations: At most so many products.
        damping: rho. 0 for strongly convex losses, 1e-3 to 1 for networks.

    Stops at a direction p with `p G p <= 0`, which a minimum does not have, and keeps what
    it has. At most P products in exact arithmetic. Memory: five trees of weights.
    Where compiled loops are slow (convolutions on CPU) all `max_iterations` are written out and
    run: set it to what is needed.

    Source:
        Hestenes & Stiefel (1952); Pedregosa (2016) for hypergradients.
    """
    tolerance = check_number("tolerance", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    damping = check_number("damping", damping)

    def solve(product, alpha, start, key, loop):
        del key
        product = _damped(product, damping)
        b, scale = _unit(alpha)
        x = tree_scale(1 / scale, start)
        r = optax.tree.sub(b, product(x))
        # A start that is worse than none is not used.
        useful = tree_l2_norm(r) < 1
        x = jax.tree.map(lambda a: jnp.where(useful, a, 0), x)
        r = jax.tree.map(lambda a, c: jnp.where(useful, a, c), r, b)
        rr = tree_dot(r, r)
        first = (x, r, r, rr, jnp.asarray(jnp.inf, rr.dtype), jnp.zeros((), jnp.int32))

        def going(carry):
            _, _, _, rr, curvature, k = carry
            # ||r|| <= sqrt(condition number) ||b||: beyond that the system is singular.
            sound = (rr < 1 / jnp.finfo(rr.dtype).eps) & (curvature > 0)
            return (rr > tolerance**2) & sound & (k < max_iterations)

        def body(carry):
            x, r, p, rr, curvature, k = carry
            Gp = product(p)
            pGp = tree_dot(p, Gp)
            good = pGp > 0  # False for NaN too
            step = jnp.where(good, rr / jnp.where(good, pGp, 1), 0)
            x = optax.tree.add_scale(x, step, p)
            r = optax.tree.add_scale(r, -step, Gp)
            curvature = jnp.minimum(curvature, pGp / tree_dot(p, p))
            rr, before = tree_dot(r, r), rr
            p = optax.tree.add_scale(r, rr / before, p)
            return x, r, p, rr, curvature, k + 1

        x, _, _, _, curvature, k = _while(going, body, first, max_iterations, loop)
        return _judged(product, b, x, scale, k, curvature)

    return solve


def neumann(terms: int = 20, step_size: float = 0.1) -> Solver:
    """`u = a sum_{j=0}^{K} alpha (I - a G)^j`: K products, K + 1 terms.

    Args:
        terms: K. The error of the operator is at most `(1 - a m)^(K+1) / m`, with m the
            smallest eigenvalue; as a truncated unroll, K is the number of steps less one.
        step_size: a, at most 1 / (largest eigenvalue); the inner learning rate is a good
            choice. With `2 / (largest eigenvalue)` or more the series diverges: it is cut off
            where a term is ten times alpha, and the residual says so.

    Source:
        Lorraine et al. (2020), algorithm 3; the last factor a is part of the result.
    """
    terms = check_count("terms", terms, minimum=0)
    a = check_number("step_size", step_size)

    def solve(product, alpha, start, key, loop):
        del start, key
        b, scale = _unit(alpha)

        def body(carry, _):
            v, p, curvature, converges = carry
            Gv = product(v)
            curvature = jnp.minimum(curvature, _ratio(tree_dot(v, Gv), tree_dot(v, v)))
            new = optax.tree.add_scale(v, -a, Gv)
            converges &= tree_l2_norm(new) < DIVERGED  # False for NaN too
            v = tree_where(converges, new, v)
            return (v, tree_where(converges, optax.tree.add(p, v), p), curvature, converges), None

        first = (b, b, jnp.asarray(jnp.inf, scale.dtype), jnp.asarray(True))
        (_, p, curvature, _), _ = lax.scan(body, first, length=terms, unroll=_unroll(loop, terms))
        x = tree_scale(a, p)
        return _judged(product, b, x, scale, jnp.asarray(terms, jnp.int32), curvature)

    return solve


def identity(step_size: float = 1.0) -> Solver:
    """`u = a alpha`: the curvature is taken for a multiple of the identity.

    T1-T2 as an implicit method; with `a` the inner learning rate it is the one-step method
    at the minimum, and the Neumann series without iterations.

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
        b, scale = _unit(alpha)
        flat, unravel = ravel_pytree(b)
        index = jax.random.permutation(key, flat.size)[:rank]
        C = _rows(product, unravel, flat, index)  # k x P, the columns as rows
        W = C[:, index]
        Cb = C @ flat
        small = jnp.linalg.solve(W + C @ C.T / rho, Cb)
        x = unravel(flat / rho - small @ C / rho**2)
        curvature = jnp.linalg.eigvalsh((W + W.T) / 2)[0]
        k = jnp.asarray(index.size, jnp.int32)
        return _judged(_damped(product, rho), b, x, scale, k, curvature)

    return solve


def dense(damping: float = 0.0) -> Solver:
    """Materialise `G` by P products and factorise it; for some two thousand weights at most.

    The reference of the others. Also for `G` that is not symmetric.
    """
    damping = check_number("damping", damping)

    def solve(product, alpha, start, key, loop):
        del start, key, loop
        product = _damped(product, damping)
        b, scale = _unit(alpha)
        flat, unravel = ravel_pytree(b)
        G = _rows(product, unravel, flat, jnp.arange(flat.size))
        x = unravel(jnp.linalg.solve(G.T, flat))
        curvature = jnp.linalg.eigvalsh((G + G.T) / 2)[0]
        return _judged(product, b, x, scale, jnp.asarray(flat.size, jnp.int32), curvature)

    return solve


def gmres(tolerance: float = 1e-6, max_iterations: int = 100, damping: float = 0.0) -> Solver:
    """`jax.scipy.sparse.linalg.gmres`, for the unsymmetric `I - A` of a fixed point.

    It does not say how often it took the product; `iterations` is the most it may have.
    Its loops are compiled ones, which convolutions on CPU are slow in.
    """
    tolerance = check_number("tolerance", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    damping = check_number("damping", damping)

    def solve(product, alpha, start, key, loop):
        del key, loop
        product = _damped(product, damping)
        b, scale = _unit(alpha)
        restart = min(20, max_iterations)
        x, _ = jax.scipy.sparse.linalg.gmres(
            product,
            b,
            tree_scale(1 / scale, start),
            tol=tolerance,
            restart=restart,
            maxiter=-(-max_iterations // restart),
        )
        restarts = -(-max_iterations // restart)
        k = jnp.asarray(restart * restarts, jnp.int32)
        return _judged(product, b, x, scale, k, jnp.asarray(jnp.inf, scale.dtype))

    return solve


# -- what they share -------------------------------------------------------------------------


def _damped(product: Product, damping: float) -> Product:
    if damping == 0:
        return product
    return lambda u: optax.tree.add_scale(product(u), damping, u)


def _unit(alpha: Any) -> tuple[Any, jax.Array]:
    """`alpha / |alpha|` and the norm, 1 where alpha is zero."""
    norm = tree_l2_norm(alpha)
    norm = jnp.where(norm == 0, 1, norm)
    return tree_scale(1 / norm, alpha), norm


def _judged(product, b, x, scale, iterations, curvature) -> Solution:
    """The solution in the units of alpha, with its true residual."""
    Gx = product(x)
    residual = tree_l2_norm(optax.tree.sub(Gx, b))
    curvature = jnp.minimum(curvature, _ratio(tree_dot(x, Gx), tree_dot(x, x)))
    return Solution(tree_scale(scale, x), iterations, residual, curvature)


def _rows(product: Product, unravel, flat: jax.Array, index: jax.Array) -> jax.Array:
    """`e_i G` for the coordinates in `index`, as the rows of a matrix."""
    unit = jax.nn.one_hot(index, flat.size, dtype=flat.dtype)
    return jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0])(unit)


def _while(going, body, first, most: int, loop: Loop):
    """`lax.while_loop`, or its steps written out where compiled loops are slow."""
    if loop == "scan":
        return lax.while_loop(going, body, first)

    def masked(carry, _):
        go_on = going(carry)
        return jax.tree.map(lambda a, b: jnp.where(go_on, a, b), body(carry), carry), None

    return lax.scan(masked, first, length=most, unroll=True)[0]


def _unroll(loop: Loop, steps: int) -> bool | int:
    return True if loop != "scan" and steps else 1


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, and infinity where b is 0: a zero direction has no curvature."""
    return jnp.where(b == 0, jnp.inf, a / jnp.where(b == 0, 1, b))
