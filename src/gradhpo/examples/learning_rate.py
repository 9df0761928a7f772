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
from gradhpo.examples.mnist import BATCH, accuracy, cross_entropy, init

__all__ = ["HYPERPARAMS", "OUTER", "PROBLEM", "layerwise_sgd", "loss", "main", "rates", "task"]

# The logarithms of the rates, one for each layer of the network of the first example.
HYPERPARAMS = {name: np.float32(np.log(0.01)) for name in ("layer1", "layer2", "layer3")}
OUTER = optax.adam(0.1)  # moves them


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


def loss(params: Any, hyperparams: Any, batch: Any) -> jax.Array:
    """Cross-entropy, for training and for validation: the rates act in the optimizer alone."""
    del hyperparams
    return cross_entropy(params, *batch)


PROBLEM = gradhpo.BilevelProblem(gradhpo.from_optax(loss, layerwise_sgd), loss)


def rates(hyperparams: Any) -> dict[str, Any]:
    """The learning rates as they are used."""
    return {name: np.exp(value) for name, value in hyperparams.items()}


def task(
    seed: int, train: gradhpo.DataBatch, val: gradhpo.DataBatch, test: Any = None
) -> gradhpo.Task:
    """The problem with these images and labels, which is validated on all at once; as in `mnist`.

    >>> data = datasets.digits().train
    >>> f"{rates(task(0, data, data).hyperparams)['layer1']:.2f}"
    '0.01'
    """
    return gradhpo.Task(
        PROBLEM,
        init(seed, train.inputs),
        HYPERPARAMS,
        train=datasets.batches(train, BATCH, 2 * seed),
        val=datasets.batches(val, len(val.targets), 2 * seed + 1),
        natural=rates,
        test=test,
    )


def main(M: int = 60) -> None:
    """Tune on digits in M > 1 training runs; of the first and the last: accuracy and rates."""
    train, val, test = datasets.split(datasets.digits().train, [400, 400, 997], 0)
    runs: list[gradhpo.BilevelState] = []
    gradhpo.tune(
        task(0, train, val, test),
        gradhpo.reverse(100),  # the exact hypergradient of a whole training run
        OUTER,
        episodes=M,
        T=100,
        lr_reptile=0.0,  # the next run starts where this one did
        callback=lambda m, state: runs.append(state),
    )
    for name, used, run in (
        ("before", HYPERPARAMS, runs[0]),
        ("after", runs[-2].hyperparams, runs[-1]),
    ):
        told = ", ".join(f"{x:.3f}" for x in rates(used).values())
        print(f"{name}: test accuracy {100 * accuracy(run.params, test):.1f} %, rates {told}")


if __name__ == "__main__":
    main()
