"""A convolutional network with BatchNorm in Flax NNX: its rate, weight decay and label smoothing.

    gradhpo tune gradhpo.examples.problems.nnx_cnn:task --method reverse --seeds 5 \
        --episodes 10 --steps 200 --outer-rate 0.2

An episode is a whole training, from new weights and new statistics.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gradhpo as gh
from gradhpo import datasets, spaces


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.first(images)))
        return self.head(nnx.relu(self.second(x)).reshape(len(x), -1))


GRAPH = nnx.split(nnx.eval_shape(lambda: CNN(nnx.Rngs(0))))[0]


def train_loss(params, lam, batch, state):
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.train()
    targets = optax.smooth_labels(jax.nn.one_hot(batch[1], 10), lam["smoothing"])
    loss = optax.softmax_cross_entropy(net(batch[0]), targets).mean()
    return loss, (nnx.split(net, nnx.Param, ...)[2], {})


def val_loss(params, lam, batch, state):
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.eval()
    scores = net(batch[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()
    return loss, {"accuracy": jnp.mean(scores.argmax(-1) == batch[1])}


def begin(params, lam, key):
    _, params, state = nnx.split(CNN(nnx.Rngs(key)), nnx.Param, ...)
    return gh.Start(params, model_state=state)


def optimizer(lam):
    return optax.adamw(lam["rate"], weight_decay=lam["decay"], eps_root=1e-8)


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss, begin=begin)
SPACE = {"rate": spaces.log(), "decay": spaces.log(), "smoothing": spaces.interval(0, 0.5)}


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    params, _, state = begin(None, None, jax.random.key(seed))
    lam = {"rate": 1e-3, "decay": 1e-4, "smoothing": 0.01}
    sources = gh.Resident(train, 50, seed=2 * seed), gh.Resident(val, 100, seed=2 * seed + 1)
    return gh.Task(PROBLEM, params, lam, *sources, model_state=state, space=SPACE, test=test)
