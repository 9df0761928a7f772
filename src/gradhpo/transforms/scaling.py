"""A step size for every parameter, as an Optax transformation."""

import jax
import optax

from gradhpo.core.types import PyTree
from gradhpo.utils.gradients import tree_broadcast

__all__ = ["scale_by_tree"]


def scale_by_tree(step_sizes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by `step_sizes`, a prefix of the parameters (`optax.scale` takes a number).

    With a minus sign it is the learning rate of every parameter, differentiable in a factory
    `hyperparams -> optimizer`; leaves broadcast, so one number per layer will do.

    >>> import jax.numpy as jnp
    >>> from gradhpo import OneStepOptimizer
    >>> def inner_optimizer(lam):  # momentum, and a learning rate exp(lam) per parameter
    ...     rates = jax.tree.map(lambda x: -jnp.exp(x), lam)
    ...     return optax.chain(optax.trace(0.9), scale_by_tree(rates))
    >>> opt = OneStepOptimizer(inner_optimizer=inner_optimizer)
    >>> loss = lambda w, lam, batch: jnp.sum((w["a"] - batch) ** 2)
    >>> state = opt.init({"a": jnp.zeros(2)}, {"a": jnp.log(jnp.array([0.1, 0.5]))})
    >>> print(opt.step(state, 1.0, 1.0, loss, loss, lr_hyper=0.1).params["a"].round(3))
    [0.2 1. ]
    """

    def update(updates, params=None):
        del params
        sizes = tree_broadcast(step_sizes, updates)
        return jax.tree.map(lambda u, s: (s * u).astype(u.dtype), updates, sizes)

    return optax.with_extra_args_support(optax.stateless(update))
