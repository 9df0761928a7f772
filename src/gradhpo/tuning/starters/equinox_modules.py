"""A task for gradhpo: an Equinox network with BatchNorm and Dropout on digits.

    gradhpo tune {module}:task --method one_step --seeds 3

Replace the module, the data and the hyperparameters by your own.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import datasets, spaces


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 64, key=one)
        self.norm = eqx.nn.BatchNorm(64, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(64, 10, key=two)

    def __call__(self, image, state, key):
        x, state = self.norm(self.hidden(image.ravel()), state)
        return self.head(self.drop(jax.nn.relu(x), key=key)), state


def parts(seed):
    """Weights, the rest of the module, and what it carries from step to step."""
    net, state = eqx.nn.make_with_state(Net)(jax.random.key(seed))
    return *eqx.partition(net, eqx.is_inexact_array), state


STATIC = parts(0)[1]  # functions and settings, the same for every seed


def scores(net, state, images, keys):
    over_batch = jax.vmap(net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    return over_batch(images, state, keys)


def train_loss(params, hyperparams, batch, carried):
    images, labels = batch
    key, own = jax.random.split(carried["key"])
    net = eqx.combine(params, STATIC)
    logits, state = scores(net, carried["state"], images, jax.random.split(own, len(images)))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), hyperparams["smoothing"])
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss, ({"state": state, "key": key}, {})


def val_loss(params, hyperparams, batch, carried):  # a loss that falls smoothly, no accuracy
    images, labels = batch
    net = eqx.nn.inference_mode(eqx.combine(params, STATIC))
    logits, _ = scores(net, carried["state"], images, jax.random.split(carried["key"], len(images)))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == labels)}  # looked at, not tuned by


def optimizer(hyperparams):  # whatever Optax takes may be a hyperparameter
    return optax.adamw(hyperparams["rate"], weight_decay=hyperparams["decay"], eps_root=1e-8)


# What is tuned: in natural scale, where it starts, and where it may be.
START = {"rate": 1e-3, "decay": 1e-2, "smoothing": 0.1}
SPACE = {"rate": spaces.log(), "decay": spaces.log(), "smoothing": spaces.interval(0.0, 0.5)}
# Made once: programs are compiled again for another problem.
PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss)


def task(seed=0, batch_size=50):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    params, _, state = parts(seed)
    return gh.Task(
        PROBLEM,
        params,
        {name: np.float32(value) for name, value in START.items()},
        train=gh.Resident(train, batch_size, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        model_state={"state": state, "key": jax.random.key(seed + 1)},
        space=SPACE,
        test=test,  # nothing is tuned on these
    )
