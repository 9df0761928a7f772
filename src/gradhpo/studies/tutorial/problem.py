"""The tutorial's problem: a small network on noisy clusters, a learning rate for every weight.

The network is 10-32-5 with ReLU: 517 weights, and as many learning rates

    w <- w - softplus(lam) * grad L_train(w),    lam shaped like w

Validation loss judges the weights and does not contain lam, so the first-order method sees
nothing here, by construction.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import (
    BilevelProblem,
    Dynamics,
    Window,
    from_optax,
    from_update,
    init_state,
    run_episodes,
)
from gradhpo.algorithms.registry import METHODS
from gradhpo.core.source import fetch, gather
from gradhpo.core.types import Batch, Hyper, Params
from gradhpo.datasets.corruption import corrupt_labels

__all__ = [
    "SETTINGS",
    "Outcome",
    "Run",
    "cost",
    "draw",
    "literal_greedy",
    "loss",
    "outer_rule",
    "start",
    "tuned",
    "untuned",
    "update_fn",
]

FEATURES, HIDDEN, CLASSES = 10, 32, 5
HYPERPARAMS = 517
CUTS = (320, 352, 512)  # of the 517 weights, into both layers' matrices and biases
TRAIN, VALIDATION, BATCH = 500, 200, 128
NOISE = 0.2  # share of the training labels that are drawn anew
PERIOD = 10  # episodes between two fits of HyperDistill's theta

SETTINGS: dict[str, dict[str, Any]] = {
    "fo": {},
    "one_step": {},
    "t1t2": {"gamma": 0.9},
    "greedy": {"unroll_steps": 5, "gamma": 0.9},
    "hyperdistill": {"gamma": 0.99, "estimation_period": PERIOD},
    "reverse": {},
}
"""The methods that can tune a learning rate, and how each is set."""


class Outcome(NamedTuple):
    """What one method did on every seed."""

    losses: np.ndarray  # validation loss on all 200 after each episode, (seeds, episodes)
    moved: np.ndarray  # how far each learning rate has moved, (seeds, 517)
    theta_fits: np.ndarray  # HyperDistill's, before any guard, (seeds, fits); else NaN

    @property
    def score(self) -> np.ndarray:
        """Mean loss of the last five episodes, (seeds,)."""
        return self.losses[:, -5:].mean(axis=1)


def draw(seed: int, episodes: int, steps: int) -> tuple[Params, Window, Window]:
    """Initial weights, the data, and the indices of all batches, of one seed.

    Every quantity has a random stream of its own: which labels are wrong does not depend on
    what they are replaced by, and all methods meet the same batches.

    Returns:
        `(weights, data, indices)`: the weights (517,); inputs (n, 10) and one-hot labels (n, 5)
        for training and validation; int32 indices (episodes, steps, 128) into them.

    >>> weights, data, indices = draw(0, episodes=3, steps=4)
    >>> weights.size, data.train[0].shape, indices.val.shape
    (517, (500, 10), (3, 4, 128))
    """
    *streams, noise = np.random.SeedSequence(seed).spawn(7)
    rngs = [np.random.default_rng(stream) for stream in streams]
    centres = 2 * rngs[0].standard_normal((CLASSES, FEATURES))

    def examples(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(CLASSES, size=count)
        inputs = centres[labels] + 0.5 * rng.standard_normal((count, FEATURES))
        return inputs.astype(np.float32), labels

    def one_hot(labels: np.ndarray) -> np.ndarray:
        return np.eye(CLASSES, dtype=np.float32)[labels]

    inputs, clean = examples(rngs[1], TRAIN)
    noisy, _ = corrupt_labels(int(noise.generate_state(1)[0]), clean, NOISE, CLASSES)
    val_inputs, val_labels = examples(rngs[2], VALIDATION)
    data = Window((inputs, one_hot(noisy)), (val_inputs, one_hot(val_labels)))

    def layer(fan_in: int, fan_out: int) -> np.ndarray:
        he = np.sqrt(2 / fan_in) * rngs[3].standard_normal((fan_in, fan_out))
        return he.astype(np.float32)

    biases = np.zeros(HIDDEN, np.float32), np.zeros(CLASSES, np.float32)
    first, second = layer(FEATURES, HIDDEN), layer(HIDDEN, CLASSES)
    weights = np.concatenate([x.ravel() for x in (first, biases[0], second, biases[1])])
    size = (episodes, steps, BATCH)
    indices = Window(
        rngs[4].integers(TRAIN, size=size, dtype=np.int32),
        rngs[5].integers(VALIDATION, size=size, dtype=np.int32),
    )
    return weights, data, indices


def loss(weights: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the network on `(inputs, one-hot labels)`."""
    inputs, targets = batch
    first, bias, second, offset = jnp.split(weights, CUTS)
    hidden = jax.nn.relu(inputs @ first.reshape(FEATURES, HIDDEN) + bias)
    outputs = hidden @ second.reshape(HIDDEN, CLASSES) + offset
    scores = jax.nn.log_softmax(outputs)
    return -jnp.mean(jnp.sum(targets * scores, axis=-1))


def update_fn(weights: Params, lam: Hyper, batch: Batch) -> Params:
    """Phi: gradient descent with a learning rate per weight."""
    return weights - jax.nn.softplus(lam) * jax.grad(loss)(weights, batch)


def val_loss(weights: Params, lam: Hyper, batch: Batch) -> jax.Array:
    del lam
    return loss(weights, batch)


def start(weights: Params, rate: jax.typing.ArrayLike) -> Hyper:
    """`lam` for which every learning rate is `rate`: the inverse of softplus."""
    return jnp.full(weights.shape, jnp.log(jnp.expm1(rate)), weights.dtype)


def outer_rule(adam: jax.Array, rates: jax.Array, per_episode: int) -> optax.GradientTransformation:
    """Adam or plain steps, chosen by a traced flag, at `rates[m]` in all updates of episode m.

    One compiled program then serves every outer optimizer and rate: here compiling takes
    longer than running.
    """
    moments = optax.scale_by_adam()

    def update(updates: Any, state: Any, params: Any = None):
        scaled, state = moments.update(updates, state, params)
        return jax.tree.map(lambda a, b: jnp.where(adam, a, b), scaled, updates), state

    def factor(count: Any):
        return -rates[count // per_episode]

    choose = optax.GradientTransformation(moments.init, update)
    return optax.chain(choose, optax.scale_by_schedule(factor))


Run = Callable[..., Any]
"""Compiled `(weights, data, indices, rate, adam, rates) -> (losses, moved, fits)`, an `Outcome`.

The first three have a leading axis for the seeds. Learning rates start at `rate`; `adam` and
`rates`, one per episode, are those of `outer_rule`.
"""


@cache
def untuned(restart: bool = False) -> Run:
    """Training alone, all learning rates fixed: no estimator, no outer loop."""

    def run(weights, data, indices, rate, adam, rates):
        del adam, rates
        lam = start(weights, rate)

        def episode(begin, chosen):
            def step(w, i):
                return update_fn(w, lam, gather(data.train, i)), None

            end, _ = jax.lax.scan(step, begin, chosen)
            return begin if restart else end, loss(end, data.val)

        _, losses = jax.lax.scan(episode, weights, indices.train)
        return losses, jnp.zeros_like(lam), jnp.full((1,), jnp.nan)

    return _over_seeds(run)


@cache
def tuned(name: str, steps: int, restart: bool = False) -> Run:
    """A run of the method `name`, episodes of `steps` inner steps.

    With `restart` every episode starts from the same weights, and only the learning rates
    are carried over.
    """
    method = METHODS[name].make(update_fn=update_fn, T=steps, **SETTINGS[name])
    return _compiled(method, from_update(update_fn), restart)


@cache
def literal_greedy() -> Run:
    """Greedy as the original tutorial calls it, in episodes of 5 steps.

    No hyperparameter occurs in its inner optimizer or in the losses: its hypergradient is 0.
    """
    sgd = optax.sgd(0.01)
    method = METHODS["greedy"].make(inner_optimizer=sgd, **SETTINGS["greedy"])
    return _compiled(method, from_optax(val_loss, sgd), restart=False)


def _compiled(method: Any, dynamics: Dynamics, restart: bool) -> Run:
    estimator, period = method.estimator(), method.estimation_interval
    problem = BilevelProblem(dynamics, val_loss)
    assert method.T is not None
    updates = method.T // estimator.unroll_steps  # per episode

    def run(weights, data, indices, rate, adam, rates):
        def observe(state):
            return loss(state.params, data.val), state.get_metric("theta_fit", jnp.nan)

        outer, lam = outer_rule(adam, rates, updates), start(weights, rate)
        first = fetch(data, jax.tree.map(lambda i: i[0, :1], indices))  # the shape of a batch
        state = init_state(problem, estimator, outer, weights, lam, first)
        state, (losses, fits) = run_episodes(
            estimator,
            outer,
            problem,
            state,
            indices,
            lr_reptile=0.0 if restart else 1.0,
            estimation_period=period,
            resident=data,
            observe=observe,
        )
        moved = jax.nn.softplus(state.hyperparams) - jax.nn.softplus(lam)
        return losses, moved, fits[::period]

    return _over_seeds(run)


def _over_seeds(run: Callable[..., Any]) -> Run:
    """All seeds in one program, `vmap` over five at a time: their arrays then stay in cache.

    On a CPU this takes two thirds of the time of `vmap` over twenty.
    """

    def runs(weights, data, indices, *setting):
        seeds = (weights, data, indices)
        return jax.lax.map(lambda seed: run(*seed, *setting), seeds, batch_size=5)

    return jax.jit(runs)


def cost(name: str, episodes: int, steps: int) -> tuple[float, float]:
    """Gradients and second-order products of one seed's run."""
    if name == "fixed":
        return episodes * steps, 0
    method = METHODS[name].make(update_fn=update_fn, T=steps, **SETTINGS[name])
    return method.estimator().cost(steps, HYPERPARAMS, episodes=episodes, period=PERIOD)
