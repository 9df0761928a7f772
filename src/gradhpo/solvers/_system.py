"""What the solvers of `u G = alpha` share: the form of a solution, and how it is judged.

Vectors are trees like the weights. The right-hand side is scaled to norm 1, and lengths are
taken of scaled vectors, so that losses of size 1e-22 or 1e22 do not leave the range of float32
when they are squared.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from gradhpo.core.types import Loop
from gradhpo.utils.gradients import tree_dot, tree_l2_norm, tree_scale
from gradhpo.utils.settings import check_number

__all__ = [
    "NOISE",
    "Coarse",
    "Limited",
    "Product",
    "Solution",
    "Solver",
    "check_damping",
    "check_tolerance",
    "damped",
    "extremes",
    "from_start",
    "judged",
    "length",
    "plus",
    "rounding",
    "rows",
    "spectrum",
    "unit",
    "while_loop",
]

Product = Callable[[Any], Any]


class Coarse(NamedTuple):
    """A product that rounds more than the dtypes of its vectors say: that of narrow weights."""

    product: Product
    rounding: float  # its unit

    def __call__(self, u: Any) -> Any:
        return self.product(u)


NOISE = 16.0
"""So many units of rounding, relative to |G|, is what a product may be wrong by."""


class Solution(NamedTuple):
    """An approximate solution of `u G = alpha` and how good it is."""

    u: Any
    iterations: jax.Array  # products spent on it, the check not counted
    residual: jax.Array  # |u G - alpha| / |alpha|, computed anew
    curvature: jax.Array  # smallest u G u / |u|^2 met, 0 if none or within rounding
    least_squares: jax.Array | bool = False  # no u leaves a smaller residual: G is singular


Solver = Callable[[Product, Any, Any, jax.Array, Loop], Solution]


class Limited(NamedTuple):
    """A solver that says what it may cost; `dense`, for one, cannot before it sees the weights."""

    solve: Solver
    iterations: int  # at most, a product each
    checks: int = 1  # further products: of the answer, and of a start

    def __call__(self, product: Product, alpha: Any, start: Any, key: jax.Array, loop: Loop):
        return self.solve(product, alpha, start, key, loop)


def check_tolerance(name: str, value: Any) -> float:
    """A relative residual to stop at, 0 for never; `name` is the solver, for the message."""
    tolerance = check_number("tolerance", value)
    if not 0 <= tolerance < 1:
        number = f"{tolerance:g}" if tolerance >= 1 and tolerance.is_integer() else "..."
        raise ValueError(
            "tolerance is the relative residual to stop at, at least 0 and below 1, got "
            f"{tolerance:g}. For a number of iterations write {name}(max_iterations={number})."
        )
    return tolerance


def check_damping(value: Any) -> float:
    """What is added to the diagonal of G; not negative."""
    damping = check_number("damping", value)
    if damping < 0:
        raise ValueError(
            f"damping is added to the curvature and must not be negative, got {damping:g}."
        )
    return damping


def damped(product: Product, damping: float) -> Product:
    """The product with `G + damping I`."""
    if damping == 0:
        return product
    return Coarse(lambda u: plus(product(u), damping, u), getattr(product, "rounding", 0.0))


def plus(x: Any, a: jax.typing.ArrayLike, y: Any) -> Any:
    """`x + a y`, every leaf keeping its dtype."""
    return jax.tree.map(lambda x, y: (x + a * y).astype(x.dtype), x, y)


def length(tree: Any) -> jax.Array:
    """Euclidean norm; the squares neither vanish nor overflow."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]))
    # NaN and infinity are left to the norm itself.
    largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return largest * tree_l2_norm(tree_scale(1 / largest, tree))


def unit(tree: Any) -> tuple[Any, jax.Array]:
    """`tree / |tree|` and the norm, 1 where the tree is zero."""
    norm = length(tree)
    norm = jnp.where(norm == 0, 1, norm)
    return tree_scale(1 / norm, tree), norm


def rounding(tree: Any, product: Product | None = None) -> float:
    """The unit of rounding of the narrowest leaf, or of the product where that is coarser."""
    units = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree)]
    return max(getattr(product, "rounding", 0.0), *units)


def extremes(
    least: jax.Array, largest: jax.Array, vGv: jax.Array, vv: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Smallest curvature and largest absolute one, those of direction v taken in.

    A direction whose square is within rounding of the smallest number has no say.
    """
    number = jnp.finfo(vv.dtype)
    known = vv > number.tiny / number.eps
    curvature = vGv / jnp.where(known, vv, 1)
    return (
        jnp.where(known, jnp.minimum(least, curvature), least),
        jnp.where(known, jnp.maximum(largest, jnp.abs(curvature)), largest),
    )


def from_start(product: Product, b: Any, start: Any) -> tuple[Any, Any]:
    """`(x, b - x G)` at the start, or at zero where the start is worse than none; one product."""
    r = optax.tree.sub(b, product(start))
    useful = tree_l2_norm(r) < 1  # False for NaN too
    x = jax.tree.map(lambda a: jnp.where(useful, a, 0), start)
    return x, jax.tree.map(lambda a, c: jnp.where(useful, a, c), r, b)


def judged(
    product: Product,
    b: Any,
    x: Any,
    scale: jax.Array,
    iterations: jax.Array,
    least: jax.Array,
    largest: jax.Array,
) -> Solution:
    """The solution in the units of alpha, with its true residual; one product.

    Args:
        b, x: Scaled by 1 / `scale`, so that b has norm 1.
        least: Smallest curvature met, infinite if none was; reported as 0 then, and within
            rounding, so that a positive semidefinite G has no negative one.
        largest: Largest absolute curvature, or another estimate of |G|. Where rounding in the
            product with x can be as large as b, the residual says nothing and is infinite: an x far
            out in the null space of G.
    """
    Gx = product(x)
    residual = tree_l2_norm(optax.tree.sub(Gx, b))
    direction, norm = unit(x)
    along = tree_dot(direction, tree_scale(1 / norm, Gx))
    least, largest = extremes(least, largest, along, tree_dot(direction, direction))
    noise = NOISE * rounding(b, product) * largest
    lost = noise * norm > jnp.maximum(1, residual)  # False for NaN
    return Solution(
        tree_scale(scale, x),
        iterations,
        jnp.where(lost, jnp.inf, residual),
        jnp.where((jnp.abs(least) <= noise) | (least == jnp.inf), 0, least),
    )


def rows(product: Product, unravel: Callable, flat: jax.Array, index: jax.Array) -> jax.Array:
    """`e_i G` for the coordinates in `index`, as the rows of a matrix."""
    units = jax.nn.one_hot(index, flat.size, dtype=flat.dtype)
    return jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0])(units)


def spectrum(G: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest eigenvalue of the symmetric part, and the largest absolute one."""
    eigenvalues = jnp.linalg.eigvalsh((G + G.T) / 2)
    return eigenvalues[0], jnp.max(jnp.abs(eigenvalues))


def while_loop(going: Callable, body: Callable, first: Any, most: int, loop: Loop) -> Any:
    """`lax.while_loop`, or its steps written out where compiled loops are slow."""
    if loop == "scan":
        return lax.while_loop(going, body, first)

    def masked(carry, _):
        go_on = going(carry)
        return jax.tree.map(lambda a, b: jnp.where(go_on, a, b), body(carry), carry), None

    return lax.scan(masked, first, length=most, unroll=True)[0]
