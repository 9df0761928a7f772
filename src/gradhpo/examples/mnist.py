"""Handwritten digits: how much to regularise, learned while the network trains.

    python -m gradhpo.examples.mnist

A small network learns a few hundred examples by heart, with the wrong labels that some of them
have. An L2 penalty on each layer helps, but how strong? Here the three strengths are
hyperparameters: while the network trains they follow the gradient of the validation loss. What is
printed compares, on test data, the penalties one would have started with and those that were
learned. The study `gradhpo run regularisation` repeats this over seeds, on larger data too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from gradhpo import datasets

__all__ = [
    "HYPERPARAMS",
    "OPTIMIZER",
    "accuracy",
    "batches",
    "cross_entropy",
    "init",
    "logits",
    "main",
    "train_loss",
    "tune",
    "val_loss",
]

BATCH = 50
HIDDEN = 128
# The logarithms of the penalties: whatever is added to them, a penalty stays positive.
HYPERPARAMS = {name: np.float32(np.log(1e-4)) for name in ("layer1", "layer2", "layer3")}
# One step ahead after every training step (T1-T2, Luketina et al. 2016); 20 steps an episode.
OPTIMIZER = gradhpo.OneStepOptimizer(
    inner_optimizer=optax.sgd(0.1),  # trains the network
    outer_optimizer=optax.adam(0.02),  # moves the penalties
    T=20,
)


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


def batches(data: Any, seed: int) -> Callable[[], Any]:
    """An endless source of training batches."""
    return datasets.batches(data, BATCH, seed)


def tune(
    params: Any, train: Any, val: Any, seed: int, optimizer: Any = OPTIMIZER, **run: Any
) -> gradhpo.BilevelState:
    """Train the network and its penalties at once.

    Args:
        params: From `init`.
        train, val: Images and labels.
        seed: Of the batches.
        optimizer: The method.
        run: Settings of its `run`: M episodes, `callback` …

    >>> data = datasets.digits().train
    >>> state = tune(init(0, data.inputs), data, data, seed=0, M=1)
    >>> int(state.step), sorted(state.hyperparams)
    (20, ['layer1', 'layer2', 'layer3'])
    """
    return optimizer.run(
        optimizer.init(params, HYPERPARAMS),
        get_train_batch=batches(train, 2 * seed),
        get_val_batch=datasets.batches(val, BATCH, 2 * seed + 1),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
        **run,
    )


def accuracy(params: Any, data: Any) -> float:
    """The part of the examples whose class has the highest score."""
    return float(np.mean(np.argmax(logits(params, data.inputs), axis=1) == data.targets))


def main(M: int = 200) -> None:
    """Train on digits with a fifth of the labels drawn anew: penalties left alone, then tuned."""
    train, val, test = datasets.split(datasets.digits().train, [400, 400, 997], 0)
    labels, _ = datasets.corrupt_labels(0, train.targets, 0.2, 10)
    train, params = gradhpo.DataBatch(train.inputs, labels), init(0, train.inputs)
    alone = dataclasses.replace(OPTIMIZER, outer_optimizer=optax.set_to_zero())
    for name, optimizer in (("before", alone), ("after", OPTIMIZER)):
        state = tune(params, train, val, seed=0, optimizer=optimizer, M=M)
        penalties = ", ".join(f"{np.exp(x):.1e}" for x in state.hyperparams.values())
        print(f"{name}: test accuracy {100 * accuracy(state.params, test):.1f} %,", end=" ")
        print(f"penalties {penalties}")


if __name__ == "__main__":
    main()
