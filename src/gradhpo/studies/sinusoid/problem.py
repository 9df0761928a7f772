"""The network of the study `sinusoid`, its losses, what every seed draws, and how it is tested."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import roll
from gradhpo.core.problem import BilevelProblem, Start, Window
from gradhpo.meta import Sinusoids

__all__ = [
    "QUERIES",
    "RATE",
    "SHOTS",
    "SIZE",
    "TASKS",
    "Drawn",
    "Tests",
    "draw",
    "draw_tasks",
    "features",
    "given",
    "initial",
    "judge",
    "mse",
    "predict",
    "problem",
]

WIDTHS = (1, 100, 100, 100, 1)
TASKS, SHOTS, QUERIES = 10, 10, 10  # of a meta-batch; to train on; at every step to validate on
RATE = 0.01  # of training
SIZE = sum((n + 1) * m for n, m in zip(WIDTHS[:-2], WIDTHS[1:-1], strict=True))  # of lam
GRID = np.linspace(-5, 5, 201)[:-1] + 0.025  # where a test task is judged

Layer = dict[str, Any]


class Tests(NamedTuple):
    """Test tasks: points to train on, and the values at `GRID`."""

    x: jax.Array  # (tests, SHOTS)
    y: jax.Array
    truth: jax.Array  # (tests, len(GRID))


class Drawn(NamedTuple):
    """What does not depend on the method; every leaf has the seeds as its leading axis."""

    head: Any
    body: Any
    tasks: Window  # (seeds, M, TASKS, T, points)
    tests: Tests


def initial(seed: int) -> tuple[Layer, list[Layer]]:
    """`(head, body)`: weights and biases of a layer are uniform in +-1/sqrt(inputs), as PyTorch
    initialises them.

    >>> head, body = initial(0)
    >>> [layer["w"].shape for layer in body], float(np.abs(head["b"]).max()) <= 0.1
    ([(1, 100), (100, 100), (100, 100)], True)
    """
    uniform = np.random.default_rng(seed).uniform
    layers = [
        {
            "w": uniform(-1, 1, (n, m)).astype(np.float32) / np.float32(np.sqrt(n)),
            "b": uniform(-1, 1, m).astype(np.float32) / np.float32(np.sqrt(n)),
        }
        for n, m in zip(WIDTHS, WIDTHS[1:], strict=False)
    ]
    return layers[-1], layers[:-1]


def features(body: list[Layer], x: jax.Array) -> jax.Array:
    """Points (n,) to the hundred units under the head."""
    x = x[:, None]
    for layer in body:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


def predict(head: Layer, units: jax.Array) -> jax.Array:
    return (units @ head["w"] + head["b"])[:, 0]


def mse(head: Layer, body: list[Layer], batch: Any) -> jax.Array:
    """Training and validation loss: the head is w, what is under it lam."""
    x, y = batch
    return jnp.mean((predict(head, features(body, x)) - y) ** 2)


def problem(momentum: Any) -> BilevelProblem:
    """Tasks are learned by SGD from the head that the last ones have left behind."""
    optimizer = optax.sgd(RATE, momentum=momentum)
    return BilevelProblem(from_optax(mse, optimizer), mse, begin=given)


def given(params: Any, lam: Any, window: Window) -> Start:
    """A task begins where the last ones have ended; a draw holds its batches."""
    del lam
    return Start(params, window)


def draw(seeds: int, episodes: int, sinusoids: Sinusoids, tests: int) -> Drawn:
    """In a program of its own: random numbers drawn inside would be compiled for every method."""
    weights = [initial(seed) for seed in range(seeds)]
    head, body = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    tasks, test_keys = draw_tasks(seeds, episodes, sinusoids)
    return Drawn(head, body, tasks, _tests(sinusoids, test_keys, tests))


def draw_tasks(seeds: int, episodes: int, sinusoids: Sinusoids) -> tuple[Window, jax.Array]:
    """`(tasks, keys)`: the meta-batches of all seeds and episodes, and a key of each seed."""
    keys = jnp.stack([jax.random.split(jax.random.key(seed)) for seed in range(seeds)])
    number = episodes * TASKS
    flat = jnp.concatenate([jax.random.split(key, number) for key in keys[:, 0]])
    tasks = jax.jit(jax.vmap(sinusoids))(flat)  # one axis: nested ones take XLA four times as long
    shape = (seeds, episodes, TASKS)
    return jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), tasks), keys[:, 1]


def _tests(sinusoids: Sinusoids, keys: jax.Array, number: int) -> Tests:
    @jax.vmap
    def one(key):
        x, y = jax.tree.map(lambda leaf: leaf[0], sinusoids(key).train)
        return Tests(x, y, sinusoids.curve(key)(jnp.asarray(GRID, jnp.float32)))

    tests = jax.jit(one)(jnp.concatenate([jax.random.split(key, number) for key in keys]))
    return jax.tree.map(lambda x: x.reshape(len(keys), number, -1), tests)


def _head_mse(head: Layer, body: Any, batch: Any) -> jax.Array:
    del body
    units, y = batch
    return jnp.mean((predict(head, units) - y) ** 2)


def judge(head: Layer, body: list[Layer], tests: Tests, steps: int, momentum: Any) -> jax.Array:
    """Mean squared error of test tasks, each learned from `head` in so many steps.

    The body is fixed, so that its units are evaluated once.
    """
    dynamics = from_optax(_head_mse, optax.sgd(RATE, momentum=momentum))
    start = dynamics.init(head, body)

    def learned(units, y):
        batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), (units, y))
        return roll(dynamics, start, body, batches).params

    units = features(body, tests.x.reshape(-1)).reshape(*tests.x.shape, WIDTHS[-2])
    heads = jax.vmap(learned)(units, tests.y)
    found = jax.vmap(predict, in_axes=(0, None))(heads, features(body, jnp.asarray(GRID)))
    return jnp.mean((found - tests.truth) ** 2)
