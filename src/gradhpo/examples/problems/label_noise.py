"""Digits of which two in five have a random label: a weight for each of 800 examples.

    gradhpo tune gradhpo.examples.problems.label_noise:task --seeds 5 --outer-rate 0.1

The weights are tuned while the network trains, by 400 examples whose labels are right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import datasets, spaces


def losses(params, images, labels):
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["hidden"] + params["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], labels)


def train_loss(params, lam, batch):
    images, labels, row = batch
    return jnp.average(losses(params, images, labels), weights=lam[row])


def val_loss(params, lam, batch):
    return losses(params, *batch).mean()


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optax.adam(1e-3, eps_root=1e-8)), val_loss)


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    labels, _ = datasets.corrupt_labels(seed, train.targets, 0.4, 10)
    normal = np.random.default_rng(seed).standard_normal
    params = {"hidden": normal((64, 64)) / 8, "bias": np.zeros(64), "out": normal((64, 10)) / 8}
    return gh.Task(
        PROBLEM,
        jax.tree.map(np.float32, params),
        np.full(len(labels), 0.5, np.float32),
        train=gh.Resident((train.inputs, labels, np.arange(len(labels))), 50, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        space=spaces.probability(),
        test=test,
    )
