"""One small problem and every method on it, for the tests of the classes.

Its losses are under `jit`, so that JAX keeps what it has traced of them from test to test.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.algorithms import METHODS as REGISTRY

T = 4


@jax.jit
def train_loss(w, lam, batch):
    """Both hyperparameters move its minimum, or the implicit methods would refuse them."""
    pull = 0.1 * jnp.exp(jnp.sum(lam["rate"])) * jnp.sum(w["w"] ** 2)
    return jnp.mean((w["w"] - batch) ** 2) * jnp.exp(jnp.sum(lam["scale"])) / 2 + pull


@jax.jit
def val_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + 0.1 * jnp.sin(jnp.sum(lam["rate"] + lam["scale"]))


def update_fn(w, lam, batch):
    gradient = jax.grad(train_loss)(w, lam, batch)
    return {"w": w["w"] - jnp.exp(jnp.sum(lam["rate"])) * gradient["w"]}


def trained_by(optimizer):
    """What a class trains with: this optimizer, at a learning rate that is tuned."""
    return lambda lam: optimizer(jnp.exp(jnp.sum(lam["rate"])))


sgd = trained_by(optax.sgd)


def own(entry):
    """What a method wants beside T; the rest takes its default settings."""
    settings = dict(entry.example.of_class)
    if entry.example.trained_by is not None:
        settings["inner_optimizer"] = trained_by(entry.example.trained_by)
    return settings


METHODS = {
    **{name: (entry, own(entry)) for name, entry in REGISTRY.items()},
    "t1t2_averaged": (REGISTRY["t1t2"], {"gamma": 0.9}),
}
KINDS = ("fo", "one_step", "greedy", "hyperdistill", "reverse", "pes", "implicit_cg", "saba")
"""One per kind of window and memory: for what depends on the class alone, not on its method."""

ANY_STEP = tuple(name for name, (_, x) in METHODS.items() if "inner_optimizer" not in x)
"""Methods that take an `update_fn`."""


def method(name, **settings):
    entry, wanted = METHODS[name]
    settings = {"T": T, **wanted, **settings}
    if "inner_optimizer" not in settings:
        settings.setdefault("update_fn", update_fn)
    return entry.make(**settings)


def start(dtype=jnp.float32, name=None):
    """Weights and hyperparameters; those of FDS have a leading axis of one piece."""
    params = {"w": jnp.array([1.0, -2.0], dtype)}
    shape = (1,) if name == "fds" else ()
    lam = {"rate": jnp.full(shape, -2.0, dtype), "scale": jnp.full(shape, 0.1, dtype)}
    return params, lam


def batch(seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((3, 2)).astype(dtype)


class Source:
    """The same batches again after `Source(seed)` is made again."""

    def __init__(self, seed, dtype=np.float32):
        self.seed, self.calls, self.dtype = seed, 0, dtype

    def __call__(self):
        self.calls += 1
        return batch((self.seed, self.calls), self.dtype)


def run(opt, state, M=2, lr_hyper=0.1, losses=(train_loss, val_loss), dtype=np.float32, **more):
    if opt.outer_optimizer is not None:
        lr_hyper = None
    sources = {"get_train_batch": Source(1, dtype), "get_val_batch": Source(2, dtype)}
    with warnings.catch_warnings():
        # Some methods are inaccurate here, with the settings that their names stand for.
        warnings.filterwarnings("ignore", message=r".*: 0 of the \d+ updates of this run")
        return opt.run(
            state,
            M,
            **{**sources, **more},
            train_loss_fn=losses[0],
            val_loss_fn=losses[1],
            lr_hyper=lr_hyper,
        )


def step(opt, state, seed=0, lr_hyper=0.1, losses=(train_loss, val_loss)):
    if opt.outer_optimizer is not None:
        lr_hyper = None
    return opt.step(state, batch(seed), batch(seed + 100), *losses, lr_hyper=lr_hyper)


def floats(state):
    return {"params": state.params, "hyperparams": state.hyperparams}
