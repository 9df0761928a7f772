"""A learned schedule to take home: `schedule.json`, and the Optax optimizer that follows it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.studies.schedule.problem import Schedule, start
from gradhpo.studies.shared.reversible import Rows, cross_entropy, names, on_rows

__all__ = ["losses_with_optax", "optimizer", "parse", "plain", "read_schedule", "schedule_of"]

PAIRS = 10  # seeds of the comparison with Optax


def plain(lam: Schedule) -> dict[str, Any]:
    """The content of `schedule.json`."""
    return {
        "groups": names(len(lam.log_scale)),
        "learning_rate": np.exp(lam.log_rate).tolist(),
        "momentum": np.asarray(jax.nn.sigmoid(lam.logit_momentum)).tolist(),
        "initial_scale": np.exp(lam.log_scale).tolist(),
    }


def read_schedule(path: str | Path) -> tuple[list[str], dict[str, Any]]:
    """`(groups, tables)` of a `schedule.json`: learning rates and momenta (steps, groups)."""
    return parse(Path(path).read_text(encoding="utf-8"))


def parse(text: str) -> tuple[list[str], dict[str, Any]]:
    """`read_schedule` of the content of a file."""
    content = json.loads(text)
    tables = {k: np.asarray(v) if k != "groups" else v for k, v in content.items()}
    return content["groups"], tables


def schedule_of(column: np.ndarray) -> optax.Schedule:
    """An Optax schedule from a table of its values; the last one holds from then on."""
    values = jnp.asarray(column, jnp.float32)
    return lambda count: values[jnp.minimum(count, len(values) - 1)]


def optimizer(tables: dict[str, Any]) -> optax.GradientTransformation:
    """The Optax optimizer with these schedules, for a list of weights and biases.

    `optax.ema` is momentum in the dampened form of the paper.

    >>> tables = {"learning_rate": np.ones((3, 2)), "momentum": np.full((3, 2), 0.5)}
    >>> step = optimizer(tables)
    >>> w = [jnp.zeros(2), jnp.zeros(1)]
    >>> print(step.update([jnp.ones(2), jnp.ones(1)], step.init(w))[0][0])
    [-0.5 -0.5]
    """
    rates, momenta = tables["learning_rate"], tables["momentum"]
    groups = range(rates.shape[1])
    each: dict[Any, optax.GradientTransformation] = {
        i: optax.chain(
            optax.inject_hyperparams(optax.ema, static_args="debias")(
                decay=schedule_of(momenta[:, i]), debias=False
            ),
            optax.scale_by_learning_rate(schedule_of(rates[:, i])),
        )
        for i in groups
    }
    return optax.partition(each, list(groups))


def losses_with_optax(data: Rows, tables: dict[str, Any]) -> np.ndarray:
    """Losses (seeds, parts) of fresh runs with Optax and nothing of ours."""
    step, loss = optimizer(tables), on_rows(data.train)
    log_scale = jnp.log(jnp.asarray(tables["initial_scale"], jnp.float32))

    @jax.jit
    def train(key):
        weights: Any
        weights, index = start(data, log_scale, len(tables["momentum"]), key)

        def body(state, index):
            params, slots = state
            updates, slots = step.update(jax.grad(loss)(params, None, index), slots, params)
            return (optax.apply_updates(params, updates), slots), None

        (weights, _), _ = lax.scan(body, (weights, step.init(weights)), index)
        return jnp.stack([cross_entropy(weights, part) for part in data])

    return np.array([train(jax.random.key(2_000_000 + i)) for i in range(PAIRS)], np.float64)
