"""A task for gradhpo: a Flax Linen network with BatchNorm and Dropout on digits.

    gradhpo tune {module}:task --method one_step --seeds 3

Replace the module, the data and the hyperparameters by your own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import gradhpo as gh
from gradhpo import datasets, spaces


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(64)(images.reshape(len(images), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


NET = Net()


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    key, own = jax.random.split(state["key"])
    scores, new = NET.apply(
        {"params": params, "batch_stats": state["batch_stats"]},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": own},
    )
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), hyperparams["smoothing"])
    loss = optax.softmax_cross_entropy(scores, targets).mean()
    return loss, ({**new, "key": key}, {})


def val_loss(params, hyperparams, batch, state):  # a loss that falls smoothly, no accuracy
    images, labels = batch
    variables = {"params": params, "batch_stats": state["batch_stats"]}
    return judged(NET.apply(variables, images, train=False), labels)


def judged(scores, labels):
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
    variables = NET.init(jax.random.key(seed), train.inputs[:1], train=False)
    return gh.Task(
        PROBLEM,
        variables["params"],
        {name: np.float32(value) for name, value in START.items()},
        train=gh.Resident(train, batch_size, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        model_state={"batch_stats": variables["batch_stats"], "key": jax.random.key(seed + 1)},
        space=SPACE,
        test=test,  # nothing is tuned on these
    )
