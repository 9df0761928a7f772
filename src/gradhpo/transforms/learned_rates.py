"""What hypergradient descent has made of the learning rates in an optimizer's state."""

from typing import Any

import jax
import numpy as np
import optax

from gradhpo.core.types import OptState, PyTree
from gradhpo.transforms.hypergradient_descent import HypergradientDescentState

__all__ = ["hypergradient_status", "learning_rates"]


def learning_rates(state: OptState) -> dict[str, PyTree]:
    """Every learned rate in an optimizer's state, by its path.

    Args:
        state: State of a chain, of groups (`optax.multi_transform`), of a stack, or of
            anything else that holds a `HypergradientDescentState`.

    Returns:
        Path to rate: a scalar, or for scope "leaf" or "parameter" a tree of them. In a stack
        beta stands below `rate_state`, named like any rate.

    Raises:
        ValueError: there is none.

    >>> import jax.numpy as jnp
    >>> from gradhpo.transforms import sgd_hd
    >>> stack = sgd_hd(0.1, hypergradient_lr=sgd_hd(0.01, 1e-4))
    >>> {path: f"{rate:.2f}" for path, rate in learning_rates(stack.init(jnp.zeros(3))).items()}
    {'learning_rate': '0.10', 'rate_state.learning_rate': '0.01'}
    """
    return _fields(state, "learning_rate")


def hypergradient_status(state: OptState) -> str:
    """What became of the learned rates, in words: a line per rate, for the log.

    Args:
        state: As for `learning_rates`, with values (outside of `jit`), not batched by `vmap`.

    Raises:
        ValueError: `state` holds no learned rate.

    >>> import jax.numpy as jnp
    >>> from gradhpo.transforms import sgd_hd
    >>> opt = sgd_hd(0.1, 0.01)
    >>> _, state = opt.update(jnp.array([jnp.nan]), opt.init(jnp.zeros(1)))
    >>> print(hypergradient_status(state))  # doctest: +ELLIPSIS
    learning_rate: no finite new rate at step 0; it stays at 0.1. Look for NaN in that batch, ...
    """
    firsts = _fields(state, "first_bad_step").values()
    lines = []
    for (path, rate), first in zip(learning_rates(state).items(), firsts, strict=True):
        values = np.concatenate([np.zeros(0), *map(np.ravel, jax.tree.leaves(rate))])
        if not values.size:
            lines.append(f"{path}: no parameters")
            continue
        low, high = values.min(), values.max()
        at = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        if first < 0:
            warning = ", negative: steps go uphill, set a floor" if low < 0 else ""
            lines.append(f"{path}: finite, {at}{warning}")
            continue
        lines.append(
            f"{path}: no finite new rate at step {int(first)}; it stays at {at}. Look for NaN in "
            "that batch, else training has diverged: lower hypergradient_lr, set a ceiling, clip "
            'h (a chain of optax.clip and optax.sgd for hypergradient_lr), or rule="multiplicative"'
        )
    return "\n".join(lines)


def _fields(state: OptState, field: str) -> dict[str, Any]:
    """A field of every `HypergradientDescentState` in a state, by its path."""
    ours = HypergradientDescentState.__name__
    found = optax.tree.get_all_with_path(
        state, field, lambda path, _: getattr(path[-1], "tuple_name", "") == ours
    )
    if not found:
        raise ValueError(
            "the state holds no rate learned by hypergradient descent; it must come from the "
            "init or update of sgd_hd, adam_hd, hypergradient_descent, or of what contains them."
        )
    return {"".join(map(_entry, path)).removeprefix("."): value for path, value in found}


def _entry(key: Any) -> str:
    return f".{key.name}" if hasattr(key, "tuple_name") else str(key)
