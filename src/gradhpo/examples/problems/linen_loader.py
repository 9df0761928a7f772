"""Flax Linen with BatchNorm, fed by a loader that shifts its images: the rate and weight decay.

    gradhpo tune gradhpo.examples.problems.linen_loader:task --seeds 5 --outer-rate 0.05

Both are tuned while the network trains.
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
    def __call__(self, x, train):
        x = nn.Dense(64)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x)


def train_loss(params, lam, batch, state):
    variables = {"params": params, **state}
    scores, state = Net().apply(variables, batch[0], train=True, mutable=["batch_stats"])
    loss, metrics = judged(scores, batch[1])
    return loss, (state, metrics)


def val_loss(params, lam, batch, state):
    return judged(Net().apply({"params": params, **state}, batch[0], train=False), batch[1])


def judged(scores, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return loss, {"accuracy": jnp.mean(scores.argmax(-1) == labels)}


def optimizer(lam):
    return optax.adamw(lam["rate"], weight_decay=lam["decay"], eps_root=1e-8)


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss)


def epoch(data, size, rng):
    """The batches of an epoch; a DataLoader of PyTorch would do."""
    order = rng.permutation(len(data.targets))
    for first in range(0, len(order) - size + 1, size):
        rows = order[first : first + size]
        shift = tuple(rng.integers(-1, 2, 2))
        yield np.roll(data.inputs[rows], shift, (1, 2)), data.targets[rows]


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    state = Net().init(jax.random.key(seed), train.inputs[:1], train=False)
    params = state.pop("params")
    lam = {"rate": 1e-3, "decay": 1e-4}
    space = {"rate": spaces.log(), "decay": spaces.log()}
    rng = np.random.default_rng(seed)
    sources = datasets.from_loader(lambda: epoch(train, 50, rng)), gh.Resident(val, 100, seed)
    return gh.Task(PROBLEM, params, lam, *sources, model_state=state, space=space, test=test)
