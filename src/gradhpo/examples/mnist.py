"""Handwritten digits: how much to regularise, learned while the network trains.

    python -m gradhpo.examples.mnist

A small network learns a few hundred examples by heart, with the wrong labels that some of them
have. An L2 penalty on each layer helps, but how strong? Here the three strengths are
hyperparameters: while the network trains they follow the gradient of the validation loss. What is
printed compares, on test data, the penalties one would have started with and those that were
learned. The study `gradhpo run regularisation` repeats this over seeds, on larger data too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from gradhpo import datasets

__all__ = [
    "BATCH",
    "HYPERPARAMS",
    "OUTER",
    "PROBLEM",
    "accuracy",
    "cross_entropy",
    "init",
    "logits",
    "main",
    "penalties",
    "task",
    "train_loss",
    "val_loss",
]

BATCH = 50
HIDDEN = 128
# The logarithms of the penalties: whatever is added to them, a penalty stays positive.
HYPERPARAMS = {name: np.float32(np.log(1e-4)) for name in ("layer1", "layer2", "layer3")}
OUTER = optax.adam(0.02)  # moves them


def init(seed: int, images: Any) -> dict[str, Any]:
    """Weights of a network for such images: two hidden ReLU layers, He's initialisation."""
    sizes = (images[0].size, HIDDEN, HIDDEN, 10)
    params = {}
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:], strict=False)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        w = jax.random.normal(key, (rows, columns)) * np.sqrt(2 / rows)
        params[f"layer{i + 1}"] = {"w": w, "b": jnp.zeros(columns)}
    return params


def logits(params: Any, images: Any) -> jax.Array:
    """The network: images `(n, height, width, channels)` to scores `(n, 10)`."""
    x = images.reshape(len(images), -1)
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def cross_entropy(params: Any, images: Any, labels: Any) -> jax.Array:
    """The mean over the examples."""
    scores = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def val_loss(params: Any, hyperparams: Any, batch: Any) -> jax.Array:
    """What the hyperparameters are judged by: no penalty in it."""
    del hyperparams
    return cross_entropy(params, *batch)


def train_loss(params: Any, hyperparams: Any, batch: Any) -> jax.Array:
    """What the network is trained on: cross-entropy and the penalties."""
    squares = {name: jnp.sum(layer["w"] ** 2) for name, layer in params.items()}
    return cross_entropy(params, *batch) + sum(
        jnp.exp(hyperparams[name]) * square for name, square in squares.items()
    )


SGD = optax.sgd(0.1)  # trains the network
PROBLEM = gradhpo.BilevelProblem(gradhpo.from_optax(train_loss, SGD), val_loss)


def penalties(hyperparams: Any) -> dict[str, Any]:
    """The penalties as they are used."""
    return {name: np.exp(value) for name, value in hyperparams.items()}


def task(
    seed: int, train: gradhpo.DataBatch, val: gradhpo.DataBatch, test: Any = None
) -> gradhpo.Task:
    """The problem with these images and labels, from the beginning: draw, then train and tune.

    Args:
        seed: Of the weights and of the batches.
        train, val, test: Images and labels.

    >>> data = datasets.digits().train
    >>> sorted(task(0, data, data).hyperparams)
    ['layer1', 'layer2', 'layer3']
    """
    return gradhpo.Task(
        PROBLEM,
        init(seed, train.inputs),
        HYPERPARAMS,
        train=datasets.batches(train, BATCH, 2 * seed),
        val=datasets.batches(val, BATCH, 2 * seed + 1),
        natural=penalties,
        test=test,
    )


def accuracy(params: Any, data: Any) -> float:
    """The part of the examples whose class has the highest score."""
    return float(np.mean(np.argmax(logits(params, data.inputs), axis=1) == data.targets))


def main(M: int = 200) -> None:
    """Train on digits with a fifth of the labels drawn anew: penalties left alone, then tuned."""
    train, val, test = datasets.split(datasets.digits().train, [400, 400, 997], 0)
    labels, _ = datasets.corrupt_labels(0, train.targets, 0.2, 10)
    for name, outer in (("before", optax.set_to_zero()), ("after", OUTER)):
        mine = task(0, gradhpo.DataBatch(train.inputs, labels), val, test)
        # One step ahead after every training step (T1-T2, Luketina et al. 2016).
        state = gradhpo.tune(mine, gradhpo.one_step(), outer, episodes=M, T=20)
        told = ", ".join(f"{x:.1e}" for x in penalties(state.hyperparams).values())
        print(f"{name}: test accuracy {100 * accuracy(state.params, test):.1f} %, penalties {told}")


if __name__ == "__main__":
    main()
