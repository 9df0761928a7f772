"""Tree algebra and the two vector-Jacobian products of one training step.

The names are public by contract. Everything that Optax's `optax.tree` already does is
a thin name over it; what is written here is what Optax lacks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.utils._partition import merge, split

__all__ = [
    "avals",
    "geometric_sum",
    "tree_broadcast",
    "tree_bytes",
    "tree_dot",
    "tree_head",
    "tree_is_finite",
    "tree_l2_norm",
    "tree_last",
    "tree_lerp",
    "tree_normalize",
    "tree_scale",
    "tree_where",
    "tree_zeros_like",
    "update_w_star",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
]

PyTree = Any


def avals(tree: PyTree) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """Structure, shapes and dtypes of a tree of arrays or of their shapes, to be compared.

    >>> avals((jnp.zeros(2),)) == avals((jnp.ones(2),)), avals(0.0) == avals(0)
    (True, False)
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def tree_broadcast(prefix: PyTree, tree: PyTree) -> PyTree:
    """A prefix of a tree, repeated over what stands below each of its leaves.

    >>> tree_broadcast({"a": 1, "b": 2}, {"a": (7, 8), "b": 9})
    {'a': (1, 1), 'b': 2}
    """
    return jax.tree.map(lambda x, below: jax.tree.map(lambda _: x, below), prefix, tree)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes.

    >>> tree_bytes({"w": jnp.zeros((2, 3)), "count": jnp.int32(0)})
    28
    """
    shapes = jax.tree.leaves(jax.eval_shape(lambda: tree))
    return sum(x.size * x.dtype.itemsize for x in shapes)


def tree_dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product over all leaves.

    >>> print(tree_dot({"x": jnp.ones(3)}, {"x": jnp.arange(3.0)}))
    3.0
    """
    return jnp.asarray(optax.tree.vdot(a, b))


def tree_l2_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves.

    >>> print(tree_l2_norm((jnp.array(3.0), jnp.array([4.0]))))
    5.0
    """
    return jnp.asarray(optax.tree.norm(tree))


def tree_zeros_like(tree: PyTree) -> PyTree:
    """Zeros with the shapes and dtypes of `tree`."""
    return optax.tree.zeros_like(tree)


def tree_scale(scalar: jax.typing.ArrayLike, tree: PyTree) -> PyTree:
    """`scalar * tree`, every leaf keeping its own dtype whatever the scalar's is."""
    return jax.tree.map(lambda x: (scalar * x).astype(x.dtype), tree)


def tree_normalize(tree: PyTree) -> PyTree:
    """`tree / ||tree||`; a zero tree stays zero.

    >>> print(tree_normalize(jnp.array([3.0, 4.0])))
    [0.6 0.8]
    """
    norm = tree_l2_norm(tree)
    return tree_scale(1.0 / jnp.where(norm == 0, 1.0, norm), tree)


def tree_lerp(a: PyTree, b: PyTree, t: jax.typing.ArrayLike) -> PyTree:
    """`(1 - t) a + t b`, exact at t = 0 and t = 1 for finite leaves; integer leaves are `b`'s.

    >>> print(tree_lerp(jnp.array(2.0), jnp.array(4.0), 0.5))
    3.0
    """

    def lerp(x, y):
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.floating):
            return y
        return ((1 - t) * x + t * y).astype(y.dtype)

    return jax.tree.map(lerp, a, b)


def tree_head(tree: PyTree) -> PyTree:
    """All but the last entry of the leading axis."""
    return jax.tree.map(lambda x: x[:-1], tree)


def tree_last(tree: PyTree) -> PyTree:
    """The last entry of the leading axis."""
    return jax.tree.map(lambda x: x[-1], tree)


def tree_is_finite(tree: PyTree) -> jax.Array:
    """A boolean scalar: no floating or complex leaf of `tree` holds NaN or infinity."""
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in inexact] or True))


def tree_where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the scalar condition holds, else `b`; also for integer and key leaves."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def geometric_sum(gamma: jax.typing.ArrayLike, t: jax.typing.ArrayLike) -> jax.Array:
    """`S_t = 1 + gamma + ... + gamma^(t-1)` for 0 <= gamma <= 1 and t >= 0; also at gamma = 1.

    Written with `expm1`, so that little cancels for gamma just below 1 (where
    `(1 - gamma^t) / (1 - gamma)` loses every digit), and kept within its bounds
    `min(t, 1) <= S_t <= t`, so that `S_1` is 1 exactly.

    >>> print(geometric_sum(0.5, 3), geometric_sum(1.0, 3), geometric_sum(0.0, 3))
    1.75 3.0 1.0
    """
    gamma, t = jnp.asarray(gamma), jnp.asarray(t)
    gamma = gamma.astype(jnp.result_type(gamma.dtype, jnp.float32))
    t = t.astype(gamma.dtype)
    inside = (gamma > 0) & (gamma < 1)
    safe = jnp.where(inside, gamma, 0.5)
    series = jnp.where(inside, jnp.expm1(t * jnp.log(safe)) / (safe - 1), t)
    lowest = jnp.minimum(t, 1)
    return jnp.where(gamma == 0, lowest, jnp.clip(series, lowest, t))


def update_w_star(
    w_star: PyTree, w_prev: PyTree, gamma: jax.typing.ArrayLike, t: jax.typing.ArrayLike
) -> PyTree:
    """The distilled weights `w*_t = p_t w*_{t-1} + (1 - p_t) w_{t-1}`.

    `p_t = (gamma - gamma^t) / (1 - gamma^t)`, hence `1 - p_t = 1 / S_t`: a running mean
    whose weights decay geometrically into the past. `w*_1 = w_0`.

    Args:
        w_star: `w*_{t-1}`; any finite tree at t = 1, where its weight is zero.
        w_prev: `w_{t-1}`, the newest point.
        gamma: Decay in [0, 1].
        t: Step within the episode, from 1.

    Source:
        Lee et al. (2022), eq. (13).

    >>> print(update_w_star(jnp.array(9.0), jnp.array(1.0), 0.9, 1))
    1.0
    """
    return tree_lerp(w_star, w_prev, 1.0 / geometric_sum(gamma, t))


def vjp_wrt_both(update_fn, w: PyTree, lam: PyTree, batch: PyTree, alpha: PyTree):
    """`(alpha A, alpha B)` for the step `update_fn(w, lam, batch)`.

    `A` and `B` are the Jacobians in `w` and `lam`; one step and one reverse sweep.
    Integer leaves of `w` come back as None.

    Args:
        update_fn: The step, differentiable in its floating-point leaves.
        w: Parameters.
        lam: Hyperparameters.
        batch: One batch, not differentiated.
        alpha: Row vector shaped like `w`.

    Source:
        Lee et al. (2022), eq. (3).
    """
    floating, rest = split(w)

    def phi(floating, lam):
        return split(update_fn(merge(floating, rest), lam, batch))[0]

    _, pullback = jax.vjp(phi, floating, lam)
    return pullback(split(alpha)[0])


def vjp_wrt_lambda(update_fn, w: PyTree, lam: PyTree, batch: PyTree, alpha: PyTree) -> PyTree:
    """`alpha B`: the pullback of `alpha` through one step to the hyperparameters.

    >>> step = lambda w, lam, batch: w - lam * 2 * w
    >>> print(vjp_wrt_lambda(step, jnp.array(3.0), jnp.array(0.1), None, jnp.array(1.0)))
    -6.0
    """
    return jax.vjp(lambda lam: split(update_fn(w, lam, batch))[0], lam)[1](split(alpha)[0])[0]
