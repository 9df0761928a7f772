"""Momentum and Adam from whose slots the last update and its gradient can be computed.

Reverse mode through these optimizers stores the slots of every step and no weights: from
`w_t` and the slots after step t it recovers `w_{t-1} = w_t - U_t`. This takes less memory and
less memory traffic than storing both, and no gradient is computed a second time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.types import OptState, Params, PyTree
from gradhpo.utils.gradients import tree_broadcast
from gradhpo.utils.schedules import Rate, value_at

__all__ = ["MomentumState", "Retraceable", "adam", "momentum_sgd"]


class MomentumState(NamedTuple):
    """Slots of `momentum_sgd`."""

    trace: Params  # m_t
    step: jax.Array | None  # t, int32, where the learning rate depends on it


class Retraceable(NamedTuple):
    """A `GradientTransformation` whose last update can be read off its slots."""

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[Params, OptState]]
    last_updates: Callable[[OptState], Params]  # U_t from the slots after step t
    last_gradients: Callable[[OptState, OptState], Params]  # g_t from those before and after


def momentum_sgd(learning_rate: Rate, momentum: jax.typing.ArrayLike = 0.9) -> Retraceable:
    """SGD with heavy-ball momentum, `m_t = momentum m_{t-1} + g_t` and `w_t = w_{t-1} - rate m_t`.

    The steps of `optax.sgd(learning_rate, momentum)`; the learning rate may also be a tree.

    Args:
        learning_rate: A number; a tree that is a prefix of the parameters; or a function of
            the count of steps that returns either, as Optax's schedules are. The count is
            then kept in the slots, because the last update depends on it.
        momentum: Decay of the velocity; traced values are fine, as everywhere in a factory.

    >>> import jax.numpy as jnp
    >>> from gradhpo import ReverseOptimizer
    >>> opt = ReverseOptimizer(inner_optimizer=lambda lam: momentum_sgd(jnp.exp(lam), 0.9), T=3)
    >>> loss = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(0.0, jnp.log(0.1))
    >>> print(f"{opt.compute_hypergradient(state, 1.0, 1.0, loss, loss):.3f}")
    -0.094
    """

    def init(params):
        step = jnp.zeros((), jnp.int32) if callable(learning_rate) else None
        return MomentumState(optax.tree.zeros_like(params), step)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        trace = jax.tree.map(lambda g, m: (g + momentum * m).astype(m.dtype), updates, state.trace)
        step = None if state.step is None else jnp.asarray(optax.safe_increment(state.step))
        state = MomentumState(trace, step)
        return last_updates(state), state

    def last_updates(state):
        rate = learning_rate if state.step is None else value_at(learning_rate, state.step - 1)
        return _descend(rate, state.trace)

    def last_gradients(before, after):
        return jax.tree.map(
            lambda m, n: (n - momentum * m).astype(n.dtype), before.trace, after.trace
        )

    return Retraceable(init, update, last_updates, last_gradients)


def adam(
    learning_rate: Rate,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 1e-8,
) -> Retraceable:
    """Adam, with the steps of `optax.adam` at the same settings.

    Both moments are stored: to rebuild the second one from the first would divide by what
    float32 has rounded away wherever a gradient grows by a factor of a thousand.

    Args:
        learning_rate: As in `momentum_sgd`.
        b1, b2: Decay of the moments.
        eps: Added to the square root.
        eps_root: Added under it; positive here, because the square root has no derivative
            at zero (Optax's default is 0).
    """
    moments = optax.scale_by_adam(b1, b2, eps, eps_root)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        state = _cast_like(moments.update(updates, state, params)[1], state)
        return last_updates(state), state

    def last_updates(state):
        bias1, bias2 = 1 - b1**state.count, 1 - b2**state.count

        def step(m, v):
            return (m / bias1 / (jnp.sqrt(v / bias2 + eps_root) + eps)).astype(m.dtype)

        rate = value_at(learning_rate, state.count - 1)
        return _descend(rate, jax.tree.map(step, state.mu, state.nu))

    def last_gradients(before, after):
        return jax.tree.map(
            lambda m, n: ((n - b1 * m) / (1 - b1)).astype(n.dtype), before.mu, after.mu
        )

    return Retraceable(moments.init, update, last_updates, last_gradients)


def _cast_like(new: OptState, old: OptState) -> OptState:
    """Slots keep their dtype when a traced float32 decay would widen them."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _descend(rate: PyTree, step: Params) -> Params:
    """`-rate * step`, for one rate or a prefix of them."""
    rate = tree_broadcast(rate, step)
    return jax.tree.map(lambda r, m: (-r * m).astype(m.dtype), rate, step)
