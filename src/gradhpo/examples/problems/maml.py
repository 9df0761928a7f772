"""MAML on sinusoids: initial weights, and a rate for each, from which five steps fit a curve.

    gradhpo tune gradhpo.examples.problems.maml:task --method reverse --seeds 5 \
        --episodes 500 --outer-rate 0.003

Every episode brings ten new curves. Training begins at weights that were trained on all curves at
once, with a rate of 0.01.
"""

import jax
import jax.numpy as jnp
import optax

import gradhpo as gh
from gradhpo import spaces
from gradhpo.meta import Sinusoids
from gradhpo.transforms import scale_by_tree

CURVES, STEPS = 10, 5
SHAPES = {"in": (40,), "bias": (40,), "mid": (40, 40), "out": (40,)}
sample = jax.vmap(Sinusoids(STEPS, fresh=False), out_axes=1)  # a window of as many curves as keys


def errors(params, batch):
    h = jax.nn.relu(batch[0][:, None] * params["in"] + params["bias"])
    return jnp.mean((jax.nn.relu(h @ params["mid"]) @ params["out"] - batch[1]) ** 2)


def train_loss(params, lam, batch):  # a sum: every curve has its own weights
    return jnp.sum(jax.vmap(errors)(params, batch))


def val_loss(params, lam, batch):
    return jnp.mean(jax.vmap(errors)(params, batch))


def begin(params, lam, key):
    start = jax.tree.map(lambda x: jnp.stack([x] * CURVES), lam["start"])
    return gh.Start(start, sample(jax.random.split(key, CURVES)))


def optimizer(lam):
    return scale_by_tree(jax.tree.map(jnp.negative, lam["rate"]))


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss, begin=begin)


@jax.jit
def pretrained(key):
    adam = optax.adam(1e-3)

    def step(carry, key):
        x, y = sample(jax.random.split(key, CURVES)).train
        updates, slots = adam.update(jax.grad(errors)(carry[0], (x.ravel(), y.ravel())), carry[1])
        return (optax.apply_updates(carry[0], updates), slots), None

    keys = jax.random.split(key, 2000)
    drawn = zip(SHAPES.items(), keys, strict=False)
    w = {name: jax.random.normal(key, shape) / 6 for (name, shape), key in drawn}
    return jax.lax.scan(step, (w, adam.init(w)), keys)[0][0]


def task(seed=0):
    start = pretrained(jax.random.key(seed))
    rates = jax.tree.map(lambda x: jnp.full_like(x, 0.01), start)
    params = begin(None, {"start": start}, jax.random.key(seed)).params
    space = {"start": spaces.unconstrained(), "rate": spaces.log()}
    return gh.Task(PROBLEM, params, {"start": start, "rate": rates}, space=space)
