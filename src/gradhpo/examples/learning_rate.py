"""A learning rate for each layer, learned over many short training runs.

    python -m gradhpo.examples.learning_rate

The budget is small: a hundred steps. With the usual first guess of 0.01, SGD does not get far in
them. Each episode trains from the same initial weights, and the rates follow the gradient of
the validation loss. Methods with a short horizon see what a rate does to the next step only and
ask for rates that are too small in the long run (Wu et al. 2018); full reverse mode sees the
whole run. What is printed compares the first run with the last; the study `gradhpo run
learning_rate` repeats this over seeds, and shows both kinds of method.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from gradhpo import datasets
from gradhpo.examples.mnist import accuracy, batches, cross_entropy, init, logits

__all__ = [
    "HYPERPARAMS",
    "OPTIMIZER",
    "batches",
    "init",
    "logits",
    "loss",
    "main",
    "train_loss",
    "tune",
    "val_loss",
]

# The logarithms of the rates, one for each layer of the network of the first example.
HYPERPARAMS = {name: np.float32(np.log(0.01)) for name in ("layer1", "layer2", "layer3")}


def layerwise_sgd(hyperparams: Any) -> optax.GradientTransformation:
    """SGD whose rates are hyperparameters.

    A function from hyperparameters to an optimizer is what `inner_optimizer` takes: it is called
    inside the training step, so that the step can be differentiated with respect to the rates.
    For Adam put `optax.scale_by_adam(eps_root=1e-8)` in front; without `eps_root` a pixel that is
    always black makes the derivative NaN.
    """

    def scaled(layer, log_rate):
        return jax.tree.map(lambda g: -jnp.exp(log_rate) * g, layer)

    def update(grads, params):
        del params
        return {name: scaled(layer, hyperparams[name]) for name, layer in grads.items()}

    return optax.stateless(update)


# The exact hypergradient of a training run of 100 steps, once per run.
OPTIMIZER = gradhpo.ReverseOptimizer(
    inner_optimizer=layerwise_sgd, outer_optimizer=optax.adam(0.1), T=100
)


def loss(params: Any, hyperparams: Any, batch: Any) -> jax.Array:
    """Cross-entropy, for training and for validation: the rates act in the optimizer alone."""
    del hyperparams
    return cross_entropy(params, *batch)


train_loss = val_loss = loss


def tune(
    params: Any, train: Any, val: Any, seed: int, optimizer: Any = OPTIMIZER, **run: Any
) -> gradhpo.BilevelState:
    """Learn the rates in M training runs, each from the same `params`; arguments as in `mnist`.

    >>> data = datasets.digits().train
    >>> state = tune(init(0, data.inputs), data, data, seed=0, M=2)
    >>> bool(state.hyperparams["layer1"] > HYPERPARAMS["layer1"])
    True
    """
    return optimizer.run(
        optimizer.init(params, HYPERPARAMS),
        get_train_batch=batches(train, 2 * seed),
        get_val_batch=datasets.batches(val, len(val.targets), 2 * seed + 1),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
        lr_reptile=0.0,  # the next episode starts where this one did
        **run,
    )


def main(M: int = 60) -> None:
    """Tune on digits in M > 1 training runs; of the first and the last: accuracy and rates."""
    train, val, test = datasets.split(datasets.digits().train, [400, 400, 997], 0)
    params, runs = init(0, train.inputs), []
    tune(params, train, val, seed=0, M=M, callback=lambda m, state: runs.append(state))
    for name, used, run in (
        ("before", HYPERPARAMS, runs[0]),
        ("after", runs[-2].hyperparams, runs[-1]),
    ):
        rates = ", ".join(f"{np.exp(x):.3f}" for x in used.values())
        print(f"{name}: test accuracy {100 * accuracy(run.params, test):.1f} %, rates {rates}")


if __name__ == "__main__":
    main()
