"""Episodes that begin from hyperparameters, and the same training written out without gradhpo.

A network 3-2-1 of tanh units is trained for four steps of SGD with momentum. What is tuned, beside
a rate and a penalty, is where training begins: its initial weights, their log scales, or the
velocity, which `Dynamics.init` makes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import BilevelProblem, Outer, Start, Window, from_optax
from gradhpo.transforms import momentum_sgd, reversible_sgd

T, MOMENTUM = 4, 0.5
SHAPES = {"b1": (2,), "b2": (), "w1": (3, 2), "w2": (2,)}

# An outer update that moves nothing and keeps the hypergradient, so that it can be read off.
READ = Outer(lambda lam: jax.tree.map(jnp.zeros_like, lam), lambda h, slots, lam: (lam, h))


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)  # float64 until JAX has it


def network(seed):
    return {name: numbers((seed, i), *s) for i, (name, s) in enumerate(sorted(SHAPES.items()))}


def outputs(w, x):
    return jnp.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]


@jax.jit
def train_loss(w, lam, batch):
    x, y = batch
    penalty = jnp.exp(lam["decay"]) * sum(jnp.sum(v**2) for v in jax.tree.leaves(w))
    return jnp.mean((outputs(w, x) - y) ** 2) + penalty


@jax.jit
def val_loss(w, lam, batch):
    x, y = batch
    direct = sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(lam))
    return jnp.mean((outputs(w, x) - y) ** 2) + 0.1 * direct


def window(steps=T):
    """Five examples a batch."""
    return Window(*((numbers(i, steps, 5, 3), numbers(i + 1, steps, 5)) for i in (10, 20)))


def noise(draw):
    """Standard normal weights of a key."""
    keys = jax.random.split(draw, len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, sorted(SHAPES.items()), strict=True)
    }


# -- where training begins: `(params, lam, draw) -> (w_0, v_0)` --------------------------------


def at_network(params, lam, draw):
    return lam["start"], None


def at_one_layer(params, lam, draw):
    return params | {"w1": lam["start"]}, None


def at_scale(params, lam, draw):
    return jax.tree.map(lambda x: x * jnp.exp(lam["start"]), noise(draw)), None


def at_offset(params, lam, draw):
    """From what the last episode has left behind."""
    return jax.tree.map(lambda w: w + lam["start"], params), None


def at_velocity(params, lam, draw):
    return params, lam["start"]


STARTS = {
    "network": (at_network, network(1)),
    "layer": (at_one_layer, numbers(2, 3, 2)),
    "scale": (at_scale, np.asarray(-0.5)),
    "offset": (at_offset, np.asarray(0.3)),
    "velocity": (at_velocity, network(3)),
}


def hyperparams(name):
    return {"start": STARTS[name][1], "rate": np.asarray(-2.0), "decay": np.asarray(-3.0)}


# -- the optimizers, and their steps by hand -----------------------------------------------------


def heavy_ball(w, v, g, rate):
    v = jax.tree.map(lambda v, g: MOMENTUM * v + g, v, g)
    return jax.tree.map(lambda w, v: w - rate * v, w, v), v


def dampened(w, v, g, rate):
    v = jax.tree.map(lambda v, g: MOMENTUM * v - (1 - MOMENTUM) * g, v, g)
    return jax.tree.map(lambda w, v: w + rate * v, w, v), v


OPTIMIZERS = {  # the factory, the field of its slots that is the velocity, and its step
    "optax": (lambda lam: optax.sgd(jnp.exp(lam["rate"]), MOMENTUM), "trace", heavy_ball),
    "retraceable": (lambda lam: momentum_sgd(jnp.exp(lam["rate"]), MOMENTUM), "trace", heavy_ball),
    "reversible": (
        lambda lam: reversible_sgd(jnp.exp(lam["rate"]), MOMENTUM),
        "velocity",
        dampened,
    ),
}


def problem_of(name, optimizer):
    """The problem as gradhpo gets it."""
    at, (make, field, _) = STARTS[name][0], OPTIMIZERS[optimizer]
    dynamics = from_optax(train_loss, make)

    def init(params, lam):
        inner, (_, velocity) = dynamics.init(params, lam), at(params, lam, None)
        slots = jax.tree.map(
            lambda s: s._replace(**{field: velocity}) if hasattr(s, field) else s,
            inner.opt_state,
            is_leaf=lambda s: hasattr(s, field),
        )
        return inner._replace(opt_state=slots)

    if name == "velocity":
        return BilevelProblem(dynamics._replace(init=init), val_loss, train_loss)
    return BilevelProblem(dynamics, val_loss, train_loss, begin_of(name))


def begin_of(name):
    return lambda params, lam, draw: Start(STARTS[name][0](params, lam, draw)[0])


def written_out(name, optimizer, params, draw, data):
    """`lam -> (loss, w_T)` of the training run, from the formulas."""
    at, step = STARTS[name][0], OPTIMIZERS[optimizer][2]
    gradient = jax.jit(jax.grad(train_loss))  # traced once for all steps

    def loss(lam):
        w, v = at(params, lam, draw)
        v = jax.tree.map(jnp.zeros_like, w) if v is None else v
        for t in range(len(data.train[1])):
            g = gradient(w, lam, jax.tree.map(lambda x: x[t], data.train))  # noqa: B023
            w, v = step(w, v, g, jnp.exp(lam["rate"]))
        return val_loss(w, lam, jax.tree.map(lambda x: x[-1], data.val)), w

    return loss
