"""One-step lookahead with finite differences (DARTS second order), for any optimizer.

Liu et al. (2019), "DARTS: Differentiable Architecture Search", eq. (8), generalised from
SGD to every Optax update u = U(g, z, lam), g = grad_w L_train(w_{t-1}, lam; D_t):

    q = alpha_t dU/dg,    c = alpha_t dU/dlam        (exact, through the update alone)
    q M ~ [grad_lam L_train(w + eps q) - grad_lam L_train(w - eps q)] / (2 eps),  eps = r / ||q||
    h_t = dL_val/dlam + c + q M

w is the point before the step, alpha_t is taken after it, lam is never perturbed: one
difference gives all entries at once. The error is O(r^2), and exactly zero where
grad_lam L_train is at most quadratic in w. The derivatives of L_train must commute, which
custom gradients may prevent: such a loss is warned of.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.curvature import warn_of_custom_rules
from gradhpo.core.dynamics import Taken, pull_through_update
from gradhpo.core.estimator import Cost, Estimator
from gradhpo.core.losses import loss_value
from gradhpo.core.types import Hyper, Scalar
from gradhpo.estimators.one_step import lookahead
from gradhpo.utils._partition import merge, split
from gradhpo.utils.gradients import tree_l2_norm, tree_scale
from gradhpo.utils.settings import check_positive, unless_traced

__all__ = ["difference_product", "finite_difference"]


def finite_difference(radius: float | None = None, gamma: float = 0.0) -> Estimator:
    """T1-T2 without a second derivative: two extra training gradients per update.

    Args:
        radius: Length r of the displacement of the weights. None takes 1e-2 for losses in
            float32 or narrower (the authors' value, near the float32 optimum) and
            `1e-5 max(1, ||w||)` in float64.
        gamma: As in `one_step`.

    One coordinate of q that is NaN or very large decides the whole direction. With Adam
    use `one_step` unless every coordinate receives gradient.

    The dynamics must come from `from_optax`; an opaque `update_fn` raises ValueError.
    """
    if radius is not None:
        radius = unless_traced(check_positive, "radius (eps of T1T2Optimizer)", radius)
    return lookahead(partial(difference_product, radius=radius), gamma, Cost(4, 0))


def difference_product(dynamics, inner, lam, batch, *, radius: float | None) -> Taken:
    """`alpha B = c + q M`, the mixed part by central differences in the weights."""
    taken = pull_through_update(dynamics, inner, lam, batch)

    def product(alpha):
        q, c = taken.pullback(alpha)
        return optax.tree.add(c, _mixed(dynamics, inner, lam, batch, q, radius))

    return taken._replace(pullback=product)


def _mixed(dynamics, inner, lam, batch, q, radius: float | None) -> Hyper:
    """`q M`."""
    train_loss = dynamics.parts.train_loss
    warn_of_custom_rules(train_loss, inner, lam, batch, "finite_difference")
    w, rest = split(inner.params)
    norm = tree_l2_norm(q)
    r = _default_radius(w) if radius is None else radius
    # `norm == 0`, not `norm > 0`: a NaN in q must surface in the result.
    eps = r / jnp.where(norm == 0, 1.0, norm)

    def grad_lam(sign) -> Hyper:
        shifted = optax.tree.add(w, tree_scale(sign * eps, q))
        at = merge(shifted, rest)
        return jax.grad(lambda lam: loss_value(train_loss, at, lam, batch, inner.model_state))(lam)

    return tree_scale(1 / (2 * eps), optax.tree.sub(grad_lam(1), grad_lam(-1)))


def _default_radius(w) -> Scalar | float:
    """Balances truncation r^2 against rounding eps_mach / r."""
    if jnp.result_type(*jax.tree.leaves(w)) == jnp.float64:
        return 1e-5 * jnp.maximum(1.0, tree_l2_norm(w))
    return 1e-2
