"""A step size, or a weight decay, for every parameter or layer, as Optax transformations.

The numbers belong to the parameters by the names on the way to them: `{"hidden": 0.1}` is for all
of `params["hidden"]`, `params.hidden` or an NNX state's `hidden`, whatever the containers are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.types import PyTree

__all__ = ["decay_by_tree", "scale_by_tree"]


def scale_by_tree(step_sizes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by `step_sizes` (`optax.scale` takes one number).

    With a minus sign it is the learning rate of every parameter, differentiable in a factory
    `hyperparams -> optimizer`.

    Args:
        step_sizes: A tree with the names of the parameters, or of the layers above them; a leaf
            broadcasts over all that stands below its name.

    Raises:
        ValueError: at the update, of a parameter that has none; the message names it.

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
        sizes = _for_each("step_sizes", step_sizes, updates)
        return jax.tree.map(lambda u, s: (s * u).astype(u.dtype), updates, sizes)

    return optax.with_extra_args_support(optax.stateless(update))


def decay_by_tree(decays: PyTree) -> optax.GradientTransformationExtraArgs:
    """Add the parameters times `decays` (`optax.add_decayed_weights` takes one number).

    Args:
        decays: As in `scale_by_tree`.

    Raises:
        ValueError: as there, or the update is called without the parameters.

    >>> import jax.numpy as jnp
    >>> params = {"hidden": jnp.ones(2), "head": jnp.ones(2)}
    >>> adamw = optax.chain(  # a decay for each layer, one rate
    ...     optax.scale_by_adam(), decay_by_tree({"hidden": 0.1, "head": 0.0}), optax.scale(-0.01)
    ... )
    >>> nothing = optax.tree.zeros_like(params)
    >>> updates, _ = adamw.update(nothing, adamw.init(params), params)
    >>> print(updates["hidden"], updates["head"])
    [-0.001 -0.001] [-0. -0.]
    """

    def update(updates, params=None):
        if params is None:
            raise ValueError(
                "decay_by_tree needs the parameters, but you are not passing `params`: call "
                "update(updates, state, params)."
            )
        each = _for_each("decays", decays, updates)
        return jax.tree.map(lambda u, d, w: (u + d * w).astype(u.dtype), updates, each, params)

    return optax.with_extra_args_support(optax.stateless(update))


def _for_each(what: str, tree: PyTree, updates: PyTree) -> PyTree:
    """For every leaf of the updates the leaf of `tree` with its names, or the first few of them.

    By name, so that a dictionary of layers will do for the state of an NNX module or an Equinox
    module, which is no prefix of it to JAX. What is left over belongs to leaves that a mask hides.
    """
    given = {_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    def find(path: tuple, update: Any) -> Any:
        names = _names(path)
        for n in range(len(names) + 1):
            if names[:n] in given:
                return _fitting(given[names[:n]], update, names)
        there = ", ".join("/".join(key) for key in given) or "nothing"
        raise ValueError(
            f"{what} has nothing for the parameter {'/'.join(names) or 'itself'}: give a leaf for "
            f"it, or for a layer above it. There is {there}."
        )

    def _fitting(number: Any, update: Any, names: tuple[str, ...]) -> Any:
        shape, wanted = jnp.shape(number), jnp.shape(update)
        tail = wanted[len(wanted) - len(shape) :]
        fits = (size in (1, of) for size, of in zip(shape, tail, strict=False))
        if len(shape) > len(wanted) or not all(fits):
            raise ValueError(
                f"{what} for the parameter {'/'.join(names) or 'itself'} have the shape {shape}, "
                f"which does not broadcast to {wanted}, that of the parameter."
            )
        return number

    return jax.tree_util.tree_map_with_path(find, updates)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
