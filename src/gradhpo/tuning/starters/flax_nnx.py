"""A task for gradhpo: a Flax NNX network with BatchNorm and Dropout on digits.

    gradhpo tune {module}:task --method one_step --seeds 3

Replace the module, the data and the hyperparameters by your own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradhpo as gh
from gradhpo import datasets, spaces


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = self.hidden(images.reshape(len(images), -1))
        return self.head(self.drop(nnx.relu(self.norm(x))))


# The weights are trained; running statistics and the keys of Dropout are carried along.
GRAPH, _, _ = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...)


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.train()
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), hyperparams["smoothing"])
    loss = optax.softmax_cross_entropy(net(images), targets).mean()
    return loss, (nnx.split(net, nnx.Param, ...)[2], {})


def val_loss(params, hyperparams, batch, state):  # a loss that falls smoothly, no accuracy
    images, labels = batch
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.eval()
    scores = net(images)
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
    _, params, state = nnx.split(Net(nnx.Rngs(seed)), nnx.Param, ...)
    return gh.Task(
        PROBLEM,
        params,
        {name: np.float32(value) for name, value in START.items()},
        train=gh.Resident(train, batch_size, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        model_state=state,
        space=SPACE,
        test=test,  # nothing is tuned on these
    )
