"""One small problem and every method on it, for the tests of the classes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.algorithms.registry import METHODS as REGISTRY
from gradhpo.transforms import reversible_sgd

T = 4


def train_loss(w, lam, batch):
    """Both hyperparameters move its minimum, or the implicit methods would refuse them."""
    pull = 0.1 * jnp.exp(jnp.sum(lam["rate"])) * jnp.sum(w["w"] ** 2)
    return jnp.mean((w["w"] - batch) ** 2) * jnp.exp(jnp.sum(lam["scale"])) / 2 + pull


def val_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + 0.1 * jnp.sin(jnp.sum(lam["rate"] + lam["scale"]))


def update_fn(w, lam, batch):
    gradient = jax.grad(train_loss)(w, lam, batch)
    return {"w": w["w"] - jnp.exp(jnp.sum(lam["rate"])) * gradient["w"]}


def sgd(lam):
    return optax.sgd(jnp.exp(jnp.sum(lam["rate"])))


def reversible(lam):
    return reversible_sgd(jnp.exp(jnp.sum(lam["rate"])), momentum=0.5)


def the_only_part(batch):
    return 0


# What a method wants beside T; the rest of the registry takes its default settings. A method
# that is registered is tested, whether it has a line here or not.
OWN = {
    "greedy": {"unroll_steps": 2},
    "hyperdistill": {"gamma": 0.9, "estimation_period": 2},
    "reversible": {"inner_optimizer": reversible},
    "fds": {"pieces": 1},
    "es": {"pairs": 2, "sigma": 0.3},
    "pes": {"unroll_steps": 2, "pairs": 2, "sigma": 0.3},
    "saba": {
        "inner_optimizer": sgd,
        "train_batches": 1,
        "val_batches": 1,
        "index": the_only_part,
    },
    "amigo": {"unroll_steps": 2},
    "stocbio": {"unroll_steps": 2},
    "f2sa": {"inner_optimizer": sgd, "unroll_steps": 2},
}
METHODS = {
    **{name: (entry, OWN.get(name, {})) for name, entry in REGISTRY.items()},
    "t1t2_averaged": (REGISTRY["t1t2"], {"gamma": 0.9}),
}
KINDS = ("fo", "one_step", "greedy", "hyperdistill", "reverse", "pes", "implicit_cg", "saba")
"""One per kind of window and memory: for what depends on the class alone, not on its method."""

ANY_STEP = tuple(name for name, (_, own) in METHODS.items() if "inner_optimizer" not in own)
"""Methods that take an `update_fn`."""


def method(name, **settings):
    entry, own = METHODS[name]
    settings = {"T": T, **own, **settings}
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
