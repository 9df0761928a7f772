"""Rate, momentum and L2 penalty of a small network trained by SGD.

    gradhpo tune gradhpo.examples.problems.three_scalars:task --method reverse --seeds 5 \
        --episodes 10 --steps 300 --outer-rate 0.2

An episode is a whole training, from new weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import datasets, spaces


def val_loss(params, lam, batch):
    images, labels = batch
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["hidden"])
    scores = hidden @ params["out"]
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return loss, {"accuracy": jnp.mean(scores.argmax(-1) == labels)}


def train_loss(params, lam, batch):
    return val_loss(params, lam, batch)[0] + lam["l2"] * optax.tree.norm(params, squared=True)


def begin(params, lam, key):
    keys = dict(zip(params, jax.random.split(key), strict=True))
    return gh.Start(
        {name: jax.random.normal(keys[name], w.shape) / 8 for name, w in params.items()}
    )


def optimizer(lam):
    return optax.sgd(lam["rate"], momentum=lam["momentum"])


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss, begin=begin)


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    return gh.Task(
        PROBLEM,
        {"hidden": np.zeros((64, 64), np.float32), "out": np.zeros((64, 10), np.float32)},
        {"rate": 1e-2, "momentum": 0.9, "l2": 1e-4},
        train=gh.Resident(train, 50, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        space={"rate": spaces.log(), "momentum": spaces.probability(), "l2": spaces.log()},
        test=test,
    )
