"""Derivatives by central differences: slow, independent, and right to a known number of digits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradhpo.utils.validation import leaves_with_names

__all__ = ["central_difference", "richardson"]

PyTree = Any
UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def central_difference(f: Callable[[PyTree], Any], x: PyTree, step: float | None = None) -> PyTree:
    """Gradient of a scalar function, `(f(x + h_i e_i) - f(x - h_i e_i)) / (2 h_i)` for every entry.

    All entries are evaluated in one vectorised call; a function that cannot be traced (it
    looks at values) is called once per point instead. For speed let `f` be jitted, or made of
    jitted steps.

    Args:
        f: Scalar function of a tree.
        x: A tree of float64 leaves, at least one.
        step: `h_i = step * max(1, |x_i|)`. None takes `eps ** (1/3)`, about 6e-6, where
            truncation and rounding balance: relative error about 1e-10 for a smooth `f` of
            order one.

    Returns:
        A tree like `x`.

    Raises:
        TypeError: a leaf is not float64; the message names it. (In float32 hardly two digits
            would be left.)
    """
    return _difference(f, x, np.finfo(np.float64).eps ** (1 / 3) if step is None else step)


def richardson(f: Callable[[PyTree], Any], x: PyTree, step: float | None = None) -> PyTree:
    """Central differences at `h` and `h / 2`, combined to order `h ** 4`: `(4 D(h/2) - D(h)) / 3`.

    `step` as in `central_difference`, by default `eps ** (1/5)`, about 7e-4: relative error
    about 1e-12 for a smooth `f` of order one.
    """
    step = np.finfo(np.float64).eps ** (1 / 5) if step is None else step
    coarse, fine = _difference(f, x, step), _difference(f, x, step / 2)
    return jax.tree.map(lambda c, d: (4 * d - c) / 3, coarse, fine)


def _difference(f: Callable[[PyTree], Any], x: PyTree, step: float) -> PyTree:
    x = _float64(x)
    flat, unravel = ravel_pytree(x)
    h = step * jnp.maximum(1.0, jnp.abs(flat))
    above, below = flat + jnp.diag(h), flat - jnp.diag(h)
    points = jnp.concatenate([above, below])

    def value(point):
        out = f(unravel(point))
        if jnp.shape(out) != ():
            raise TypeError(f"f must return a scalar, but returned shape {jnp.shape(out)}.")
        return out

    try:
        values = jax.vmap(value)(points)
    except UNTRACEABLE:
        values = jnp.stack([jnp.asarray(value(point)) for point in points])
    upper, lower = jnp.split(values, 2)
    # Divided by the displacement as rounded, not by the h that was asked for.
    return unravel((upper - lower) / jnp.diagonal(above - below))


def _float64(x: PyTree) -> PyTree:
    leaves = leaves_with_names(x)
    if not leaves:
        raise TypeError("there is nothing to differentiate: the tree has no leaves.")
    for name, leaf in leaves:
        if jnp.result_type(leaf) != np.float64:
            raise TypeError(
                f"finite differences need float64, but leaf {name} is {jnp.result_type(leaf)}. "
                "Switch 64-bit types on before any array is made, "
                "jax.config.update('jax_enable_x64', True), and make the leaf float64."
            )
    return jax.tree.map(jnp.asarray, x)
