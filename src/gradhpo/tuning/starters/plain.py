"""A task for gradhpo: a network on digits, its rate, penalty and smoothing tuned while it trains.

    gradhpo tune {module}:task --method one_step --seeds 3

Replace the model, the data and the hyperparameters by your own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import datasets, spaces


def predict(params, images):
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["hidden"] + params["bias"])
    return hidden @ params["out"]


def train_loss(params, hyperparams, batch):
    images, labels = batch
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), hyperparams["smoothing"])
    return optax.softmax_cross_entropy(predict(params, images), targets).mean()


def val_loss(params, hyperparams, batch):  # a loss that falls smoothly, no accuracy
    images, labels = batch
    scores = predict(params, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return loss, {"accuracy": jnp.mean(scores.argmax(-1) == labels)}  # looked at, not tuned by


def optimizer(hyperparams):  # whatever Optax takes may be a hyperparameter
    return optax.adamw(hyperparams["rate"], weight_decay=hyperparams["decay"], eps_root=1e-8)


# What is tuned: in natural scale, where it starts, and where it may be.
START = {"rate": 1e-3, "decay": 1e-2, "smoothing": 0.1}
SPACE = {"rate": spaces.log(), "decay": spaces.log(), "smoothing": spaces.interval(0.0, 0.5)}
# Made once: programs are compiled again for another problem.
PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss)


def task(seed=0, batch_size=50):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    normal = np.random.default_rng(seed).standard_normal
    params = {
        "hidden": np.float32(normal((64, 64)) / 8),
        "bias": np.zeros(64, np.float32),
        "out": np.float32(normal((64, 10)) / 8),
    }
    return gh.Task(
        PROBLEM,
        params,
        {name: np.float32(value) for name, value in START.items()},
        train=gh.Resident(train, batch_size, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        space=SPACE,
        test=test,  # nothing is tuned on these
    )
