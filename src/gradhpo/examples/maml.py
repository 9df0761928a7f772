"""MAML on sinusoids: initial weights from which one step of gradient descent fits a new curve.

    python -m gradhpo.examples.maml

A task is a sinusoid of random amplitude and phase, seen at ten points. The hyperparameters are the
initial weights of a network; an episode takes one step of SGD from them on each of 25 tasks and is
judged at ten other points. What is printed is the error on 600 new tasks after 0 to 10 steps, from
random weights, from weights trained on all tasks at once, and from those of MAML.

Source:
    Finn et al. (2017), section 5.1: network 1-40-40-1 of rectified linear units, rate 0.01 in the
    inner and 0.001 in the outer optimizer (Adam), 25 tasks a meta-step, 70 000 meta-steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo import ReverseOptimizer, Start, Window

__all__ = ["errors", "init", "learn", "loss", "main", "pretrain", "sample"]

LAYERS = (1, 40, 40, 1)
TASKS, POINTS, RATE, META_RATE = 25, 10, 0.01, 0.001


def sample(key: jax.Array, shape: tuple[int, ...] = (POINTS,)) -> tuple[jax.Array, jax.Array]:
    """Points `(x, y)` of one sinusoid, x in [-5, 5], amplitude in [0.1, 5], phase in [0, pi]."""
    for_x, for_amplitude, for_phase = jax.random.split(key, 3)
    x = jax.random.uniform(for_x, shape, minval=-5.0, maxval=5.0)
    amplitude = jax.random.uniform(for_amplitude, minval=0.1, maxval=5.0)
    return x, amplitude * jnp.sin(x - jax.random.uniform(for_phase, maxval=jnp.pi))


def init(seed: int) -> list[dict[str, jax.Array]]:
    """Random weights of the network."""
    keys = jax.random.split(jax.random.key(seed), len(LAYERS) - 1)
    sizes = zip(keys, LAYERS[:-1], LAYERS[1:], strict=True)
    return [
        {"w": jax.random.normal(key, (a, b)) / a**0.5, "b": jnp.zeros(b)} for key, a, b in sizes
    ]


def loss(params: Any, hyperparams: Any, batch: Any) -> jax.Array:
    """Mean squared error, for training and for validation."""
    del hyperparams  # they are where training begins
    x, y = batch
    h = x[:, None]
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    h = h @ params[-1]["w"] + params[-1]["b"]
    return jnp.mean((h[:, 0] - y) ** 2)


def begin(params: Any, hyperparams: Any, key: jax.Array) -> Start:
    """Initial weights, and two batches of one sinusoid: to train on and to be judged by."""
    del params
    x, y = sample(key, (2, 1, POINTS))
    return Start(hyperparams, Window(*zip(x, y, strict=True)))


OPTIMIZER = ReverseOptimizer(
    inner_optimizer=optax.sgd(RATE),
    outer_optimizer=optax.adam(META_RATE),
    begin=begin,
    tasks=TASKS,
    T=1,
)


def learn(seed: int, M: int, **run: Any) -> Any:
    """The initial weights after M meta-steps.

    >>> weights = learn(seed=0, M=2)
    >>> [layer["w"].shape for layer in weights]
    [(1, 40), (40, 40), (40, 1)]
    """
    weights = init(seed)
    state = OPTIMIZER.init(weights, weights)
    state = OPTIMIZER.run(state, M, train_loss_fn=loss, val_loss_fn=loss, **run)
    return state.hyperparams


def pretrain(seed: int, M: int) -> Any:
    """Weights after as many steps of Adam on as many points of as many tasks, in no order."""
    adam, weights = optax.adam(META_RATE), init(seed)

    def step(carry, key):
        weights, slots = carry
        x, y = jax.vmap(lambda key: sample(key, (2 * POINTS,)))(jax.random.split(key, TASKS))
        grads = jax.grad(loss)(weights, None, (x.ravel(), y.ravel()))
        updates, slots = adam.update(grads, slots)
        return (optax.apply_updates(weights, updates), slots), None

    keys = jax.random.split(jax.random.key(seed), M)
    return jax.jit(functools.partial(jax.lax.scan, step))((weights, adam.init(weights)), keys)[0][0]


@functools.partial(jax.jit, static_argnames=("steps", "tasks"))
def errors(weights: Any, steps: int = 10, tasks: int = 600) -> jax.Array:
    """Mean squared error at 100 points after 0, 1, ... steps on ten others of each new task."""

    def adapt(key):
        x, y = sample(key, (POINTS + 100,))
        seen, unseen = (x[:POINTS], y[:POINTS]), (x[POINTS:], y[POINTS:])

        def step(w, _):
            after = jax.tree.map(lambda w, g: w - RATE * g, w, jax.grad(loss)(w, None, seen))
            return after, loss(w, None, unseen)

        return jax.lax.scan(step, weights, length=steps + 1)[1]

    return jax.vmap(adapt)(jax.random.split(jax.random.key(1_000_000), tasks)).mean(axis=0)


def main(M: int = 20_000, seeds: int = 1) -> None:
    """Mean squared error on new tasks by the number of steps taken on their ten points."""
    starts = {"random": lambda seed, M: init(seed), "all tasks": pretrain, "MAML": learn}
    shown = [0, 1, 2, 3, 5, 10]
    print("steps", *(f"{n:>8}" for n in shown))
    for name, start in starts.items():
        for seed in range(seeds):
            after = errors(start(seed, M))
            print(f"{name:>9}, seed {seed}:", *(f"{after[n]:8.3f}" for n in shown), flush=True)


if __name__ == "__main__":
    main()
