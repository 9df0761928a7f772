"""Training of the study `hypergradient_descent`: the common epochs of all optimizers.

All methods of a seed start from the same weights and see the same batches, crops and dropout,
inside one compiled program; every method may run from several initial rates side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo import datasets
from gradhpo.report.config import Progress
from gradhpo.report.parts import once
from gradhpo.studies.hypergradient_descent.models import MODELS, Images, augmented
from gradhpo.studies.hypergradient_descent.optimizers import (
    OPTIMIZERS,
    Recipe,
    inverse_sqrt,
    optimizer,
)

__all__ = ["BATCH", "Curves", "iterations_until", "train"]

BATCH = 128
CHUNK = 100  # steps between two looks at who has reached the goal


class Curves(NamedTuple):
    """What the runs of one recipe from one initial rate have shown."""

    train_loss: np.ndarray  # (seeds, epochs, iterations), before each step
    learning_rate: np.ndarray  # (seeds, epochs, iterations), as used in the step, with its decay
    val_loss: np.ndarray  # (seeds, epochs), after each epoch


class Carry(NamedTuple):
    """What training changes, with a leading axis K on every leaf."""

    params: Any
    running: Any
    opt_state: Any


def _batch_loss(model: str, params: Any, running: Any, batch: Any, key: Any) -> tuple[Any, Any]:
    """`(mean cross-entropy, running averages)` of a normalised batch `(inputs, labels)`."""
    inputs, labels = batch
    scores, running = MODELS[model].scores(params, running, inputs, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), running


def train(
    model: str,
    recipes: dict[str, Recipe],
    rates: tuple[float, ...],
    data: Images,
    seeds: int,
    epochs: int,
    progress: Progress,
) -> dict[str, list[Curves]]:
    """Train every recipe from every initial rate: for each recipe its curves in order of `rates`.

    `progress` hears of every epoch.
    """
    plan, etas = tuple(recipes.values()), jnp.asarray(rates, jnp.float32)
    history = []  # [seed][epoch] of (losses, rates, validation losses), lists by recipe
    for seed in range(seeds):

        def tell(epoch: int, losses: list[np.ndarray]) -> None:
            told = ", ".join(f"{n} {x[0]:.4f}" for n, x in zip(recipes, losses, strict=True))
            where = f"{model}, seed {seed}, epoch {epoch + 1}/{epochs}"  # noqa: B023
            if len(rates) > 1:
                where += f", from {rates[0]:g}"
            progress(f"hypergradient_descent: {where}: validation loss {told}")

        history.append(once(f"seed {seed}", _run, model, plan, etas, data, seed, epochs, tell))
    return {
        name: [
            Curves(
                *(
                    np.array([[epoch[i][field][..., k] for epoch in run] for run in history])
                    for field in range(3)
                )
            )
            for k in range(len(rates))
        ]
        for i, name in enumerate(recipes)
    }


def _run(
    model: str, plan: Any, etas: Any, data: Images, seed: int, epochs: int, tell: Callable
) -> list[list[tuple[Any, Any, Any]]]:
    """Of one seed: [epoch] of (losses, rates, validation losses), lists by recipe."""
    start, shuffle = jax.random.split(jax.random.key(seed))
    params, running = MODELS[model].init(start, data.train.inputs.shape[1:])
    carry = tuple(
        _begin(recipe, params, running, etas, np.full(len(etas), recipe.beta, np.float32))
        for recipe in plan
    )
    history = []
    for epoch in range(epochs):
        order = datasets.epoch_indices(seed, len(data.train.targets), BATCH, epoch)
        keys = jax.random.split(jax.random.fold_in(shuffle, epoch), len(order))
        steps = np.arange(len(order)) + epoch * len(order)
        carry, seen = _epoch(model, plan, carry, etas, data[:-1], (steps, order, keys))
        losses = [_evaluate(model, each, data) for each in carry]
        history.append([(*recorded, x) for recorded, x in zip(seen, losses, strict=True)])
        tell(epoch, losses)
    return history


@partial(jax.jit, static_argnums=0)
def _begin(recipe: Recipe, params: Any, running: Any, rates: Any, betas: Any) -> Carry:
    """The start of runs from several rates, the same weights for all."""

    def one(rate, beta):
        return Carry(params, running, optimizer(recipe, rate, beta).init(params))

    return jax.vmap(one)(rates, betas)


def _epoch(model: str, plan: Any, carry: Any, etas: Any, data: Any, batches: Any) -> Any:
    """All steps of an epoch; on a CPU one call each for VGG: convolutions are slow in a scan."""
    if MODELS[model].augments and jax.default_backend() == "cpu":
        seen = []
        for batch in zip(*batches, strict=True):
            carry, found = _step(model, plan, carry, etas, data, batch)
            seen.append(found)
        return carry, jax.tree.map(lambda *x: np.stack(x), *seen)
    return _scan(model, plan, carry, etas, data, batches)


def _advance(model: str, plan: Any, carry: Any, etas: Any, data: Any, batch: Any) -> Any:
    """One step of every recipe on the same batch: `(carry, [(loss, rate)])`, each by rate."""
    (train, _, mean, std), (step, rows, key) = data, batch
    inputs, crops, dropout = train.inputs[rows], *jax.random.split(key)
    if MODELS[model].augments:
        inputs = augmented(crops, inputs)
    batch = (inputs - mean) / std, train.targets[rows]

    def one(recipe, carry, rate):
        opt = optimizer(recipe, rate)
        loss = jax.value_and_grad(partial(_batch_loss, model), has_aux=True)
        (value, running), g = loss(carry.params, carry.running, batch, dropout)
        updates, opt_state = opt.update(g, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        used = OPTIMIZERS[recipe.method].rate(opt_state, rate)
        if recipe.decays:
            used = used * inverse_sqrt(step)
        return Carry(params, running, opt_state), (value, used)

    moved = [
        jax.vmap(partial(one, recipe))(each, etas) for recipe, each in zip(plan, carry, strict=True)
    ]
    return tuple(each for each, _ in moved), [seen for _, seen in moved]


_step = jax.jit(_advance, static_argnums=(0, 1), donate_argnums=2)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _scan(model: str, plan: Any, carry: Any, etas: Any, data: Any, batches: Any) -> Any:
    return lax.scan(lambda c, x: _advance(model, plan, c, etas, data, x), carry, batches)


def _evaluate(model: str, carry: Carry, data: Images) -> np.ndarray:
    """The validation loss by initial rate, in parts small enough for VGG's memory."""
    total, size = 0.0, len(data.val.targets)
    most = 500 if MODELS[model].augments else 10_000
    for first in range(0, size, most):
        part = jax.tree.map(lambda x, i=first: x[i : i + most], data.val)
        mean = _mean_loss(model, carry, part, data.mean, data.std)
        total = total + np.asarray(mean, np.float64) * len(part.targets)
    return np.asarray(total / size)


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: str, carry: Carry, part: Any, mean: Any, std: Any) -> jax.Array:
    batch = (part.inputs - mean) / std, part.targets
    return jax.vmap(lambda c: _batch_loss(model, c.params, c.running, batch, None)[0])(carry)


def iterations_until(
    model: str,
    recipe: Recipe,
    rates: np.ndarray,
    betas: np.ndarray,
    seed: int,
    data: Images,
    order: np.ndarray,
    goal: float,
) -> np.ndarray:
    """The first iteration, from 1, whose minibatch loss is at most `goal`; 0 where none is.

    Args:
        model, recipe, seed, data: As in `train`, which starts alike; beta is not the recipe's.
        rates, betas: The K runs, side by side on the same batches, float32 (K,).
        order: Examples of each batch, (iterations, batch).
        goal: The loss to be reached; a run also ends when its loss is NaN.

    Returns:
        Integers (K,).
    """
    key, _ = jax.random.split(jax.random.key(seed))
    params, running = MODELS[model].init(key, data.train.inputs.shape[1:])
    found, left = np.zeros(len(rates), int), np.arange(len(rates))
    carry = _begin(recipe, params, running, rates, betas)
    for first in range(0, len(order), CHUNK):
        batches = order[first : first + CHUNK]
        arguments = rates[left], betas[left], running, data[:-1], batches
        carry, losses = _chunk(model, recipe, carry, *arguments)
        losses = np.asarray(losses)
        reached = losses <= goal
        hit = np.where(reached.any(0), first + 1 + reached.argmax(0), 0)
        found[left] = np.where(found[left] > 0, found[left], hit)
        kept = np.flatnonzero((found[left] == 0) & ~np.isnan(losses[-1]))
        if not kept.size:
            break
        size = 1 << int(kept.size - 1).bit_length()  # few sizes, as each is a compilation
        if size < len(left):
            kept = np.resize(kept, size)  # a run that is there twice finds the same twice
            left, carry = left[kept], jax.tree.map(lambda x, kept=kept: x[kept], carry)
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _chunk(
    model: str, recipe: Recipe, carry: Any, rates: Any, betas: Any, running: Any, data: Any, order
) -> Any:
    """Some steps of every run: `(carry, losses (steps, K))`."""
    train, _, mean, std = data

    def step(carry, rows):
        batch = (train.inputs[rows] - mean) / std, train.targets[rows]

        def one(carry, rate, beta):
            (params, running, opt_state), opt = carry, optimizer(recipe, rate, beta)
            loss = jax.value_and_grad(partial(_batch_loss, model), has_aux=True)
            (value, _), g = loss(params, running, batch, None)
            updates, opt_state = opt.update(g, opt_state, params)
            return Carry(optax.apply_updates(params, updates), running, opt_state), value

        return jax.vmap(one)(carry, rates, betas)

    return lax.scan(step, carry, order)
