"""Problems whose episodes begin from the hyperparameters.

A method is exact here only if it adds `alpha_0 ds_0/dlam` (see `gradhpo.core.start`).
"""

import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import Start
from gradhpo.core.task import Task
from gradhpo.testing._build import build, numbers
from gradhpo.transforms import reversible_sgd

__all__ = ["initial_scale", "initial_weights", "there_and_back"]


def initial_scale(steps: int) -> Task:
    """The scale of each layer's initial weights and the initial biases are tuned, as is the rate.

    Two layers, momentum SGD; the network that an episode begins with is `exp(scale)` times the
    one of the task.
    """
    draw = numbers(13)

    def loss(w, lam, batch):
        del lam
        x, y = batch
        return jnp.mean((jnp.tanh(x @ w["first"] + w["bias"]) @ w["last"] - y) ** 2)

    def begin(params, lam, draw):
        del draw
        scaled = {name: jnp.exp(scale) * params[name] for name, scale in lam["log_scale"].items()}
        return Start({**scaled, "bias": lam["bias"]})

    def optimizer(lam):
        return optax.sgd(jnp.exp(lam["log_rate"]), momentum=0.5)

    params = {"first": draw(3, 4), "last": draw(4, 2), "bias": jnp.zeros(4)}
    lam = {"log_scale": {"first": -0.5, "last": -1.0}, "bias": draw(4) / 2, "log_rate": -2.0}
    train, val = [(draw(steps, 6, 3), draw(steps, 6, 2)) for _ in range(2)]
    return build(from_optax(loss, optimizer), loss, params, lam, train, val, begin=begin)


def initial_weights(steps: int) -> Task:
    """The hyperparameters are the initial weights; training from them is on a straight line.

    So DrMAD is exact, which takes the states between the ends for a line.
    """

    def train_loss(w, lam, batch):
        del lam, batch
        kappa = 1 + jnp.sin(2 * w["a"]) / 2
        return -w["a"] + kappa * w["b"] ** 2 / 2

    def outer_loss(w, lam, batch):
        del lam, batch
        return jnp.sin(w["a"]) + 2 * w["b"] + w["b"] ** 2

    def begin(params, lam, draw):
        del params, draw
        return Start(lam)

    start, data = {"a": 0.2, "b": 0.0}, jnp.zeros(steps)
    dynamics = from_optax(train_loss, optax.sgd(0.1))
    return build(dynamics, outer_loss, start, start, data, data, begin=begin)


def there_and_back(steps: int) -> Task:
    """A model state, a start made of lam, and an optimizer that can be run backwards."""
    draw = numbers(6)

    def train_loss(w, lam, x, state):
        del lam
        mean = 0.6 * state["mean"] + 0.4 * jnp.mean(x, axis=0)
        loss = jnp.mean(jnp.tanh((x - mean) @ w["w"] + w["b"]) ** 2) + jnp.sum(jnp.cos(w["w"]))
        return loss, ({"mean": mean, "seen": state["seen"] + 1}, {"seen": state["seen"]})

    def val_loss(w, lam, v, state):
        del lam
        return jnp.mean((jnp.sin((v - state["mean"]) @ w["w"]) - w["b"]) ** 2)

    def begin(params, lam, draw):
        del draw
        return Start({"w": jnp.exp(lam["log_scale"]) * params["w"], "b": lam["b"]})

    dynamics = from_optax(train_loss, lambda lam: reversible_sgd(jnp.exp(lam["log_rate"]), 0.5))
    lam = {"log_rate": -2.0, "log_scale": 0.3, "b": 0.4}
    state = {"mean": jnp.zeros(3), "seen": jnp.zeros((), jnp.int32)}
    x, v = draw(steps, 5, 3), draw(steps, 5, 3)
    params = {"w": draw(3), "b": 0.0}
    return build(dynamics, val_loss, params, lam, x, v, begin=begin, model_state=state)
