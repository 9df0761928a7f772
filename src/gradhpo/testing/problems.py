"""A zoo of small bilevel problems, each with a feature that some program got wrong.

Every entry is a function `name(steps) -> Task`, with the data of so many inner steps:

    task = ridge(5)
    inner, window = task.begin(5)

Data are fixed numbers in JAX's default float type, so that float32 and float64 see the same
problem; activations are smooth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.dynamics import from_optax, from_update
from gradhpo.core.task import Task
from gradhpo.testing._build import ProblemAt, build, numbers
from gradhpo.testing._networks import mlp_adam, mlp_chain, mlp_momentum, mlp_update_fn
from gradhpo.testing._schedules import run_backwards, three_pieces
from gradhpo.testing._starts import initial_scale, initial_weights, there_and_back
from gradhpo.testing._stateful import batch_norm
from gradhpo.transforms import scale_by_tree

__all__ = [
    "CONTRACTION_GAMMA",
    "ZOO",
    "ProblemAt",
    "at_minimum",
    "batch_norm",
    "contraction",
    "contraction_nonlinear",
    "initial_scale",
    "initial_weights",
    "integer_leaves",
    "learning_rates",
    "mlp_adam",
    "mlp_chain",
    "mlp_momentum",
    "mlp_update_fn",
    "nested",
    "opaque",
    "outer_lam",
    "quadratic_penalty",
    "ridge",
    "ridge_adam",
    "run_backwards",
    "straight_line",
    "there_and_back",
    "three_pieces",
]

CONTRACTION_GAMMA = 0.8
"""A_t = 0.8 I in `contraction` and `contraction_nonlinear`."""


def opaque(problem_at: ProblemAt) -> ProblemAt:
    """The same problem with dynamics that are one unknown step, as from an `update_fn`."""

    def problem_without_parts(steps: int) -> Task:
        task = problem_at(steps)
        dynamics = task.problem.dynamics._replace(parts=None)
        return task.replace(problem=task.problem._replace(dynamics=dynamics))

    problem_without_parts.__name__ = f"opaque_{problem_at.__name__}"
    return problem_without_parts


# -- closed forms ---------------------------------------------------------------------------


def _contraction(outer_loss: Callable, steps: int) -> Task:
    draw = numbers(1)
    constants = C, e, c = draw(5, 3), draw(5), draw(5)

    def train_loss(w, lam, d):
        return jnp.sum(w**2) + w @ (C @ lam["shift"] + e * lam["scale"] + d)

    lam = {"shift": draw(3), "scale": 0.7}
    dynamics = from_optax(train_loss, optax.sgd((1 - CONTRACTION_GAMMA) / 2))
    judge = partial(outer_loss, constants)
    return build(dynamics, judge, draw(5), lam, draw(steps, 5), draw(steps, 5))


def contraction(steps: int) -> Task:
    """A contraction: `A_t = gamma I`, `B_t` constant, and an outer loss linear in the weights."""

    def outer_loss(constants, w, lam, v):
        return constants[2] @ w + v[:3] @ lam["shift"]

    return _contraction(outer_loss, steps)


def contraction_nonlinear(steps: int) -> Task:
    """The contraction with an outer loss that is not linear: the greedy sum is no longer exact."""

    def outer_loss(constants, w, lam, v):
        return jnp.sum((w - v) ** 2) + jnp.sin(constants[2] @ w * lam["scale"])

    return _contraction(outer_loss, steps)


def _ridge(optimizer: Any, steps: int) -> Task:
    draw = numbers(2)
    x, w_true = draw(steps, 8, 4), draw(4)
    x_val = draw(steps, 6, 4)

    def outer_loss(w, lam, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) / 2

    def train_loss(w, lam, batch):
        return outer_loss(w, lam, batch) + jnp.exp(lam) * jnp.sum(w**2) / 2

    train = (x, x @ w_true + 0.3 * draw(steps, 8))
    dynamics = from_optax(train_loss, optimizer)
    return build(dynamics, outer_loss, draw(4), -1.0, train, (x_val, x_val @ w_true))


def ridge(steps: int) -> Task:
    """One scalar, the logarithm of the ridge penalty; gradient descent."""
    return _ridge(optax.sgd(0.1), steps)


def ridge_adam(steps: int) -> Task:
    """Ridge regression trained by Adam."""
    return _ridge(optax.adam(0.1, eps_root=1e-8), steps)


def quadratic_penalty(steps: int) -> Task:
    """`lam` acts by `exp(lam) w**2` alone: differences in the weights are exact at any radius."""
    draw = numbers(3)

    def outer_loss(w, lam, batch):
        return jnp.mean(jax.nn.softplus(batch @ w)) + jnp.sum(w**4) / 4

    def train_loss(w, lam, batch):
        return jnp.mean(jnp.tanh(batch @ w) ** 2) + jnp.sum(jnp.exp(lam["log_l2"]) * w**2)

    dynamics = from_optax(train_loss, optax.sgd(0.2))
    lam = {"log_l2": draw(4) - 1}
    return build(dynamics, outer_loss, draw(4), lam, draw(steps, 6, 4), draw(steps, 6, 4))


def learning_rates(steps: int) -> Task:
    """Three learning rates, `softplus(lam)`, one per weight of a diagonal quadratic."""
    draw = numbers(4)
    curvature = jnp.array([0.5, 1.0, 3.0])

    def train_loss(w, lam, d):
        return jnp.sum(curvature * (w - d) ** 2) / 2

    def optimizer(lam):
        return scale_by_tree(-jax.nn.softplus(lam))

    def outer_loss(w, lam, v):
        return jnp.sum((w - v) ** 2) / 2

    dynamics = from_optax(train_loss, optimizer)
    lam = jnp.array([-1.0, -2.0, -0.5])
    return build(dynamics, outer_loss, draw(3), lam, draw(steps, 3), draw(steps, 3))


def straight_line(steps: int) -> Task:
    """The weights move on a straight line at uniform speed through varying curvature."""

    def train_loss(w, lam, batch):
        a, b = w["a"], w["b"]
        kappa = 1 + jnp.sin(2 * a) / 2
        return -a + kappa * b**2 / 2 + (lam["constant"] + lam["slope"] * a) * b

    def outer_loss(w, lam, batch):
        return jnp.sin(w["a"]) + 2 * w["b"] + w["b"] ** 2

    dynamics = from_optax(train_loss, optax.sgd(0.1))
    lam = {"constant": 0.0, "slope": 0.0}
    data = jnp.zeros(steps)
    return build(dynamics, outer_loss, {"a": 0.2, "b": 0.0}, lam, data, data)


# -- pytrees of every kind --------------------------------------------------------------------


def nested(steps: int) -> Task:
    """Nested weights and hyperparameters, scalar leaves among them, by an `update_fn`."""
    draw = numbers(5)

    def predict(w, x):
        hidden = jnp.tanh(x @ w["encoder"]["w"])
        matrix, bias = w["decoder"]
        return hidden @ matrix + bias

    def outer_loss(w, lam, batch):
        x, y = batch["x"], batch["y"]
        return jnp.mean((predict(w, x) - y) ** 2)

    def train_loss(w, lam, batch):
        penalty = jnp.sum(jnp.exp(lam["l2"][0]) * w["encoder"]["w"] ** 2)
        penalty += jnp.exp(lam["l2"][1]) * jnp.sum(w["decoder"][0] ** 2)
        return outer_loss(w, lam, batch) + penalty

    def update_fn(w, lam, batch):
        rates = {"encoder": lam["rate"]["encoder"], "decoder": lam["rate"]["decoder"]}
        gradient = jax.grad(train_loss)(w, lam, batch)
        return {
            name: jax.tree.map(lambda a, g: a - jnp.exp(rates[name]) * g, w[name], gradient[name])  # noqa: B023
            for name in w
        }

    params = {"encoder": {"w": draw(3, 4)}, "decoder": (draw(4, 2), draw(2))}
    lam = {"rate": {"encoder": -1.0, "decoder": -1.5}, "l2": [draw(4) - 2, -2.5]}

    def data():
        return {"x": draw(steps, 6, 3), "y": draw(steps, 6, 2)}

    return build(from_update(update_fn), outer_loss, params, lam, data(), data())


def integer_leaves(steps: int) -> Task:
    """An integer count among the weights that the step reads, and integer labels."""
    draw = numbers(6)

    def outer_loss(w, lam, batch):
        x, labels = batch
        logits = jnp.tanh(x @ w["w"]) + w["b"]
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss + jnp.tanh(lam["l2"]) * jnp.mean(w["w"] ** 2)

    def update_fn(w, lam, batch):
        def train_loss(weights):
            return outer_loss({**w, **weights}, lam, batch)

        gradient = jax.grad(train_loss)({"w": w["w"], "b": w["b"]})
        rate = jnp.exp(lam["rate"]) / (1 + 0.2 * w["visits"])
        return {
            "w": w["w"] - rate * gradient["w"],
            "b": w["b"] - rate * gradient["b"],
            "visits": w["visits"] + 1,
        }

    def data(seed):
        labels = np.random.default_rng(seed).integers(0, 3, (steps, 6), dtype=np.int32)
        return draw(steps, 6, 4), jnp.asarray(labels)

    params = {"w": draw(4, 3), "b": draw(3), "visits": jnp.zeros((), jnp.int32)}
    lam = {"rate": -0.7, "l2": 0.1}
    return build(from_update(update_fn), outer_loss, params, lam, data(7), data(8))


def outer_lam(steps: int) -> Task:
    """The hyperparameters are a shared feature layer, in both losses (ANIL)."""
    draw = numbers(9)

    def loss(w, lam, batch):
        x, y = batch
        features = jnp.tanh(x @ lam["matrix"] + lam["bias"])
        return jnp.mean((features @ w - y) ** 2)

    dynamics = from_optax(loss, optax.sgd(0.2))
    lam = {"matrix": draw(3, 4), "bias": 0.3}

    def data():
        return draw(steps, 6, 3), draw(steps, 6)

    return build(dynamics, loss, draw(4), lam, data(), data())


def at_minimum(steps: int) -> Task:
    """One step leads to the minimum of its batch, from wherever it starts.

    So the exact hypergradient is the one through the minimum, and methods that assume to be
    there (implicit, single-loop) can be held against it. The Hessian has eigenvalues 0.5, 1
    and 1.5. Not in `ZOO`, because the end does not depend on the path.
    """
    draw = numbers(11)
    curvature = jnp.array([0.5, 1.0, 1.5])

    def train_loss(w, lam, d):
        return jnp.sum(curvature * (w - lam["scale"] * jnp.tanh(lam["target"]) * d) ** 2) / 2

    def outer_loss(w, lam, v):
        return jnp.sum((w - v) ** 4) / 4 + jnp.sum(lam["target"] ** 2) / 2

    dynamics = from_optax(train_loss, lambda lam: scale_by_tree(-1 / curvature))
    lam = {"target": draw(3), "scale": 0.7}
    return build(dynamics, outer_loss, draw(3), lam, draw(steps, 3), draw(steps, 3))


ZOO: dict[str, ProblemAt] = {
    problem_at.__name__: problem_at
    for problem_at in (
        contraction,
        contraction_nonlinear,
        ridge,
        ridge_adam,
        quadratic_penalty,
        learning_rates,
        straight_line,
        nested,
        integer_leaves,
        outer_lam,
        mlp_momentum,
        mlp_adam,
        mlp_chain,
        mlp_update_fn,
        batch_norm,
        initial_scale,
        initial_weights,
    )
}
"""Every problem by name."""
