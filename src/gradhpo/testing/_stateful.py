"""A network with batch normalisation, noise and metrics: losses that carry a model state."""

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.task import Task
from gradhpo.testing._build import build, numbers

__all__ = ["batch_norm"]


def batch_norm(steps: int) -> Task:
    """Running statistics, a PRNG key, a counter and metrics; Adam, its settings tuned as well.

    Training and validation normalise by the running statistics, training by those that its own
    batch is part of already. Noise on the inputs is drawn from the key.
    """
    draw = numbers(12)

    def normalised(hidden, mean, var):
        return (hidden - mean) / jnp.sqrt(var + 0.1)

    def errors(w, hidden, y):
        return jnp.mean((jnp.tanh(hidden * w["gain"] + w["bias"]) @ w["out"] - y) ** 2)

    def train_loss(w, lam, batch, state):
        x, y = batch
        key, own = jax.random.split(state["key"])
        # Uniform draws in float32 are bits: the same numbers in every program and every precision.
        noise = jax.random.uniform(own, x.shape, jnp.float32).astype(x.dtype) - 0.5
        hidden = (x + jnp.exp(lam["log_noise"]) * noise) @ w["in"]
        mean, var = jnp.mean(hidden, axis=0), jnp.var(hidden, axis=0)
        running = {
            "mean": 0.7 * state["mean"] + 0.3 * mean,
            "var": 0.7 * state["var"] + 0.3 * var,
        }
        error = errors(w, normalised(hidden, running["mean"], running["var"]), y)
        penalty = jnp.exp(lam["log_l2"]) * (jnp.sum(w["in"] ** 2) + jnp.sum(w["out"] ** 2))
        after = {**running, "key": key, "seen": state["seen"] + 1}
        return error + penalty, (after, {"error": error, "seen": state["seen"]})

    def val_loss(w, lam, batch, state):
        x, y = batch
        error = errors(w, normalised(x @ w["in"], state["mean"], state["var"]), y)
        return error, {"error": error}

    def optimizer(lam):
        b1 = jax.nn.sigmoid(lam["momentum_logit"])
        return optax.adam(jnp.exp(lam["log_rate"]), b1=b1, b2=0.95, eps_root=1e-6)

    params = {"in": draw(3, 4) / 2, "gain": 1 + draw(4) / 5, "bias": draw(4) / 5, "out": draw(4, 2)}
    lam = {"log_rate": -2.0, "momentum_logit": 1.0, "log_l2": -3.0, "log_noise": -1.0}
    model_state = {
        "mean": jnp.zeros(4),
        "var": jnp.ones(4),
        "key": jax.random.key(3),
        "seen": jnp.zeros((), jnp.int32),
    }
    train, val = [(draw(steps, 6, 3), draw(steps, 6, 2)) for _ in range(2)]
    dynamics = from_optax(train_loss, optimizer)
    return build(dynamics, val_loss, params, lam, train, val, model_state=model_state)
