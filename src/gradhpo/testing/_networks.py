"""A tanh network 3-4-2 whose optimizer is tuned as well."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import from_optax, from_update
from gradhpo.core.task import Task
from gradhpo.testing._build import build, numbers

__all__ = ["mlp_adam", "mlp_chain", "mlp_momentum", "mlp_update_fn"]


def _mlp_losses():
    def errors(w, batch):
        x, y = batch
        hidden = jnp.tanh(x @ w[0]["w"] + w[0]["b"])
        return jnp.sum((hidden @ w[1]["w"] + w[1]["b"] - y) ** 2, axis=-1)

    def outer_loss(w, lam, batch):
        return jnp.mean(errors(w, batch))

    def train_loss(w, lam, batch):
        weights = jax.nn.sigmoid(lam["example_logits"])
        penalty = sum(
            jnp.exp(log_l2) * jnp.sum(layer["w"] ** 2)
            for log_l2, layer in zip(lam["log_l2"], w, strict=True)
        )
        return jnp.mean(weights * errors(w, batch)) + penalty

    return train_loss, outer_loss


def _mlp_numbers(steps: int):
    draw = numbers(10)
    params = [{"w": draw(3, 4) / 2, "b": draw(4) / 2}, {"w": draw(4, 2) / 2, "b": draw(2) / 2}]
    lam = {
        "example_logits": draw(5),
        "log_l2": [-3.0, -4.0],
        "momentum_logit": 1.0,
        "log_rate": -2.0,
    }
    data = [(draw(steps, 5, 3), draw(steps, 5, 2)) for _ in range(2)]
    return params, lam, *data


def _mlp(make_optimizer: Callable, steps: int) -> Task:
    train_loss, outer_loss = _mlp_losses()
    return build(from_optax(train_loss, make_optimizer), outer_loss, *_mlp_numbers(steps))


def mlp_momentum(steps: int) -> Task:
    """Momentum SGD; learning rate, momentum, example weights, penalties are tuned."""

    def optimizer(lam):
        momentum = jax.nn.sigmoid(lam["momentum_logit"])
        return optax.sgd(jnp.exp(lam["log_rate"]), momentum=momentum)

    return _mlp(optimizer, steps)


def mlp_adam(steps: int) -> Task:
    """The network with Adam, its `b1` and learning rate tuned."""

    def optimizer(lam):
        b1 = jax.nn.sigmoid(lam["momentum_logit"])
        return optax.adam(jnp.exp(lam["log_rate"]), b1=b1, b2=0.95, eps_root=1e-6)

    return _mlp(optimizer, steps)


def mlp_chain(steps: int) -> Task:
    """The network with gradient clipping, AdamW, a schedule, and the weight decay tuned."""

    def optimizer(lam):
        return optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.adamw(
                lambda count: jnp.exp(lam["log_rate"]) * 0.8**count,
                weight_decay=jax.nn.sigmoid(lam["momentum_logit"]),
                eps_root=1e-6,
            ),
        )

    return _mlp(optimizer, steps)


def mlp_update_fn(steps: int) -> Task:
    """`mlp_momentum` written as an `update_fn`, its velocity a part of the weights."""
    train_loss, outer_loss = _mlp_losses()

    def update_fn(s, lam, batch):
        gradient = jax.grad(train_loss)(s["w"], lam, batch)
        momentum = jax.nn.sigmoid(lam["momentum_logit"])
        v = jax.tree.map(lambda v, g: g + momentum * v, s["v"], gradient)
        w = jax.tree.map(lambda w, v: w - jnp.exp(lam["log_rate"]) * v, s["w"], v)
        return {"w": w, "v": v}

    def judge(s, lam, batch):
        return outer_loss(s["w"], lam, batch)

    params, *rest = _mlp_numbers(steps)
    slots = {"w": params, "v": jax.tree.map(jnp.zeros_like, params)}
    return build(from_update(update_fn), judge, slots, *rest)
