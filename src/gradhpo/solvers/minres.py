"""The least-squares solution of smallest norm of a symmetric system, also a singular one.

The minimal-residual method over `K_k(G, G alpha)`, range-restricted MINRES or MR-II: the k-th
iterate minimises `|alpha - x G|` among the combinations of `alpha G, alpha G^2, ..., alpha G^k`.

    V = Lanczos vectors from alpha G      G V_k = V_{k+1} T_k,   T_k = Q_k R_k by plane rotations
    D = V_k R_k^-1                        G d_k = q_k, which are orthonormal
    x <- x + rho d_k,   r <- r - rho q_k,   rho = r . q_k

All of it lies in the range of G. What alpha has in the null space of G, which no x can answer,
stays in r and enters x not even before convergence; Krylov methods that start with alpha itself
(conjugate gradients, MINRES) take it in. The residual never grows, and G may be indefinite.

Hanke (1995), "Conjugate gradient type methods for ill-posed problems", chapter 6; Calvetti,
Lewis, Reichel (2001), "On the choice of subspace for iterative methods for linear discrete
ill-posed problems", with the recurrences of Paige and Saunders (1975).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.solvers._system import (
    NOISE,
    Limited,
    Solver,
    check_damping,
    check_tolerance,
    damped,
    judged,
    length,
    plus,
    rounding,
    unit,
    while_loop,
)
from gradhpo.utils.gradients import tree_dot, tree_l2_norm, tree_scale
from gradhpo.utils.settings import check_count

__all__ = ["minres"]


class _Rotation(NamedTuple):
    c: jax.Array
    s: jax.Array


class _Carry(NamedTuple):
    x: Any
    r: Any  # alpha - x G
    v: Any  # the newest Lanczos vector, and the one before
    v_old: Any
    beta: jax.Array  # v_old G v
    d: Any  # the last two directions
    d_old: Any
    q: Any  # G times the next direction, before its rotation
    turn: _Rotation  # the last two rotations
    turn_old: _Rotation
    tail: jax.Array  # beta rho / gamma of the last step
    gamma: jax.Array  # smallest diagonal entry of R: estimates the smallest singular value
    least: jax.Array  # smallest v G v
    size: jax.Array  # largest column of T, of the size of |G|
    k: jax.Array  # products
    done: jax.Array
    least_squares: jax.Array


COMPILED, WRITTEN_OUT = 100, 40
"""Iterations at most, where the loop is compiled and where it is not. An iteration written out
takes the compiler twice as long as one of `cg`, a second and more."""


def minres(
    tolerance: float = 1e-8, max_iterations: int | None = None, damping: float = 0.0
) -> Solver:
    """Least squares for a symmetric `H + damping I`: the default of `implicit`.

    Args:
        tolerance: Relative residual to stop at, above the least one possible; eight units of
            rounding where that is more (1e-6 in float32).
        max_iterations: At most so many products, the first of which makes no step. None: 100, and
            40 where compiled loops are slow (`loop` is "unroll" or "host": convolutions on CPU),
            as all are then written out, compiled and run.
        damping: rho. Not needed where H is singular or indefinite; it regularises an
            ill-conditioned one.

    The answer is alpha times the pseudo-inverse of G: of all u that leave the least residual the
    one of smallest norm. In float32 to about four digits where the nonzero eigenvalues span a
    factor of 10, and two or three where 100; what is wrong stands in the null space for the most
    part. In float64 to the tolerance times that factor.
    One product per iteration and one more; on well-conditioned systems about as many as `cg`.
    Memory: seven trees of weights, and what a product needs. It starts from zero at every
    update: an earlier solution has a part in the null space of another Hessian, which no residual
    shows.

    >>> G = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
    >>> found = minres()(lambda u: u @ G, jnp.ones(3), None, jax.random.key(0), "scan")
    >>> print(jnp.abs(jnp.round(found.u, 4)), found.least_squares)
    [0.5 1.  0. ] True
    """
    tolerance = check_tolerance("minres", tolerance)
    if max_iterations is not None:
        max_iterations = check_count("max_iterations", max_iterations, minimum=2)
    damping = check_damping(damping)

    def solve(product, alpha, start, key, loop):
        del start, key
        most = max_iterations or (COMPILED if loop == "scan" else WRITTEN_OUT)
        product = damped(product, damping)
        b, scale = unit(alpha)
        eps = rounding(b, product)
        goal = max(tolerance, 8 * eps)

        def going(at: _Carry):
            return ~at.done & (at.k < most)

        def body(at: _Carry):
            return _step(product, at, goal, eps)

        at = while_loop(going, body, _first(product, b, goal), most - 1, loop)
        found = judged(product, b, at.x, scale, at.k, at.least, at.size)
        # The claim rests on recurrences; it holds if the residual computed anew is theirs.
        kept = found.residual <= 1.01 * tree_l2_norm(at.r) + eps * at.size * tree_l2_norm(at.x)
        return found._replace(least_squares=at.least_squares & kept)

    return Limited(solve, max_iterations or COMPILED)


def _first(product, b, goal: float) -> _Carry:
    """`x = 0`, the first Lanczos vector, and no rotation yet."""
    v, norm = unit(product(b))
    zeros = jax.tree.map(jnp.zeros_like, b)
    zero, infinity = jnp.zeros_like(norm), jnp.full_like(norm, jnp.inf)
    still = _Rotation(jnp.ones_like(norm), zero)
    return _Carry(
        x=zeros,
        r=b,
        v=v,
        v_old=zeros,
        beta=zero,
        d=zeros,
        d_old=zeros,
        q=v,
        turn=still,
        turn_old=still,
        tail=zero,
        gamma=infinity,
        least=infinity,
        size=zero,
        k=jnp.ones((), jnp.int32),
        done=tree_l2_norm(b) <= goal,
        least_squares=jnp.asarray(False),
    )


def _step(product, at: _Carry, goal: float, eps: float) -> _Carry:
    """One product; a step, unless it shows that no step can help."""
    Gv = product(at.v)
    along, alpha = tree_dot(at.r, Gv), tree_dot(at.v, Gv)
    rest = plus(plus(Gv, -alpha, at.v), -at.beta, at.v_old)
    beta = length(rest)
    v = tree_scale(1 / jnp.where(beta == 0, 1, beta), rest)
    size = jnp.maximum(at.size, jnp.hypot(jnp.hypot(at.beta, alpha), beta))

    # r G is orthogonal to the Lanczos vectors so far: it has two components, of the newest ones.
    normal = jnp.hypot(along, beta * at.tail)
    least_squares = normal <= goal * jnp.where(jnp.isinf(at.gamma), 0, at.gamma)
    # What is left of r G is rounding, and so would be what followed it.
    least_squares |= normal <= NOISE * eps * size * tree_l2_norm(at.r)

    # The next column (beta_old, alpha, beta) of T: two old rotations, and one that removes beta.
    (c_old, s_old), (c, s) = at.turn_old, at.turn
    above = s_old * at.beta
    middle = c * c_old * at.beta + s * alpha
    corner = c * alpha - s * c_old * at.beta
    gamma = jnp.hypot(corner, beta)
    sound = (gamma > eps * size) & ~least_squares  # False for NaN too
    safe = jnp.where(sound, gamma, 1)
    turn = _Rotation(corner / safe, beta / safe)

    d = tree_scale(1 / safe, plus(plus(at.v, -middle, at.d), -above, at.d_old))
    q = plus(tree_scale(turn.c, at.q), turn.s, v)
    rho = jnp.where(sound, tree_dot(at.r, q), 0)
    r = plus(at.r, -rho, q)
    return _Carry(
        x=plus(at.x, rho, d),
        r=r,
        v=v,
        v_old=at.v,
        beta=beta,
        d=d,
        d_old=at.d,
        q=plus(tree_scale(turn.c, v), -turn.s, at.q),
        turn=turn,
        turn_old=at.turn,
        tail=beta * rho / safe,
        gamma=jnp.where(sound, jnp.minimum(at.gamma, gamma), at.gamma),
        least=jnp.minimum(at.least, alpha),
        size=size,
        k=at.k + 1,
        done=~sound | (tree_l2_norm(r) <= goal),
        least_squares=least_squares,
    )
