"""SGD-HD, SGDN-HD and Adam-HD: Optax's optimizers with a learning rate that tunes itself."""

from typing import Any

import jax
import optax
from jax.core import Tracer

from gradhpo.transforms.hypergradient_descent import Number, Rule, Scope, hypergradient_descent
from gradhpo.utils.settings import check_number

__all__ = ["adam_hd", "adamw_hd", "sgd_hd"]


def sgd_hd(
    learning_rate: Number,
    hypergradient_lr: Number | optax.GradientTransformation,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
    *,
    rule: Rule = "additive",
    scope: Scope = "global",
    floor: Number | None = None,
    ceiling: Number | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD-HD, and with momentum SGDN-HD: `optax.sgd` whose learning rate tunes itself.

    Args:
        learning_rate: eta_0.
        hypergradient_lr: beta; the paper has 1e-3 on its three problems. See
            `hypergradient_descent`, also for what else it can be.
        momentum, nesterov: As in `optax.sgd`; SGDN-HD has 0.9 and True.
        weight_decay: Factor of the weights that are added to the gradient before all else (an
            L2 penalty, part of the loss as far as h_t is concerned). Not 0: `update` needs the
            parameters.
        rule, scope, floor, ceiling, schedule: See `hypergradient_descent`.

    Raises:
        TypeError, ValueError: See `hypergradient_descent`.

    Source:
        Baydin et al. (2018), algorithms 4 and 5.

    >>> import jax.numpy as jnp
    >>> opt = sgd_hd(1e-3, hypergradient_lr=1e-3, momentum=0.9, nesterov=True)
    >>> print(optax.tree.get(opt.init(jnp.zeros(3)), "learning_rate"))
    0.001
    """
    inner = optax.sgd(1.0, momentum, nesterov)
    learned = hypergradient_descent(
        inner, learning_rate, hypergradient_lr,
        rule=rule, scope=scope, floor=floor, ceiling=ceiling, schedule=schedule,
    )  # fmt: skip
    return _with_l2(weight_decay, learned)


def adam_hd(
    learning_rate: Number,
    hypergradient_lr: Number | optax.GradientTransformation,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float | jax.Array = 0.0,
    *,
    rule: Rule = "additive",
    scope: Scope = "global",
    floor: Number | None = None,
    ceiling: Number | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam-HD: `optax.adam` whose learning rate tunes itself.

    Args:
        learning_rate: eta_0.
        hypergradient_lr: beta; the paper has 1e-7 on MNIST and 1e-8 on CIFAR-10. At 1e-4
            training can diverge: see `hypergradient_status`.
        b1, b2, eps, eps_root: As in `optax.adam`.
        weight_decay: As in `sgd_hd`: an L2 penalty. `adamw_hd` has the decoupled form.
        rule, scope, floor, ceiling, schedule: See `hypergradient_descent`.

    Raises:
        TypeError, ValueError: See `hypergradient_descent`.

    Source:
        Baydin et al. (2018), algorithm 6.

    >>> import jax.numpy as jnp
    >>> opt = adam_hd(1e-3, 0.02, rule="multiplicative", floor=1e-5)
    >>> print(optax.tree.get(opt.init(jnp.zeros(3)), "learning_rate"))
    0.001
    """
    inner = optax.adam(1.0, b1, b2, eps, eps_root)
    learned = hypergradient_descent(
        inner, learning_rate, hypergradient_lr,
        rule=rule, scope=scope, floor=floor, ceiling=ceiling, schedule=schedule,
    )  # fmt: skip
    return _with_l2(weight_decay, learned)


def adamw_hd(
    learning_rate: Number,
    hypergradient_lr: Number | optax.GradientTransformation,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float | jax.Array = 1e-4,
    mask: Any = None,
    *,
    rule: Rule = "additive",
    scope: Scope = "global",
    floor: Number | None = None,
    ceiling: Number | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam-HD with decoupled weight decay: `optax.adamw` whose learning rate tunes itself.

    The decay is scaled by the rate, so it is part of d_t; h_t still uses the gradient of the
    loss alone.

    Args:
        learning_rate: eta_0.
        hypergradient_lr: beta.
        b1, b2, eps, eps_root, weight_decay, mask: As in `optax.adamw`.
        rule, scope, floor, ceiling, schedule: See `hypergradient_descent`.

    Raises:
        TypeError, ValueError: See `hypergradient_descent`.

    >>> opt = adamw_hd(1e-3, 1e-8, scope="leaf")
    >>> {name: float(rate) for name, rate in opt.init({"w": 0.0}).learning_rate.items()}
    {'w': 0.0010000000474974513}
    """
    inner = optax.adamw(1.0, b1, b2, eps, eps_root, weight_decay=weight_decay, mask=mask)
    return hypergradient_descent(
        inner, learning_rate, hypergradient_lr,
        rule=rule, scope=scope, floor=floor, ceiling=ceiling, schedule=schedule,
    )  # fmt: skip


def _with_l2(
    weight_decay: float | jax.Array, learned: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`learned` on the gradient of the loss with its penalty.

    The state is that of `learned` at every decay, traced ones (`optax.inject_hyperparams`) too.
    """
    if not isinstance(weight_decay, Tracer) and check_number("weight_decay", weight_decay) == 0:
        return learned
    decay = optax.add_decayed_weights(weight_decay)

    def update(updates, state, params=None, **extra_args):
        penalised, _ = decay.update(updates, optax.EmptyState(), params)
        updates = jax.tree.map(lambda new, g: new.astype(g.dtype), penalised, updates)
        return learned.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(learned.init, update)
