"""One small problem and every method on it, for the tests of the classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import (
    DrMADOptimizer,
    FOOptimizer,
    ForwardOptimizer,
    GreedyOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    PESOptimizer,
    ReverseOptimizer,
    T1T2Optimizer,
)

T = 4
METHODS = {
    "fo": (FOOptimizer, {}),
    "one_step": (OneStepOptimizer, {}),
    "t1t2": (T1T2Optimizer, {}),
    "t1t2_averaged": (T1T2Optimizer, {"gamma": 0.9}),
    "greedy": (GreedyOptimizer, {"unroll_steps": 2}),
    "hyperdistill": (OnlineHypergradientOptimizer, {"gamma": 0.9, "estimation_period": 2}),
    "reverse": (ReverseOptimizer, {}),
    "forward": (ForwardOptimizer, {}),
    "rtho": (ForwardOptimizer, {"online": True}),
    "drmad": (DrMADOptimizer, {}),
    "pes": (PESOptimizer, {"unroll_steps": 2, "pairs": 2, "sigma": 0.3}),
}


def train_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) * jnp.exp(lam["scale"]) / 2


def val_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + 0.1 * jnp.sin(lam["rate"] + lam["scale"])


def update_fn(w, lam, batch):
    gradient = jax.grad(train_loss)(w, lam, batch)
    return {"w": w["w"] - jnp.exp(lam["rate"]) * gradient["w"]}


def sgd(lam):
    return optax.sgd(jnp.exp(lam["rate"]))


def method(name, **settings):
    cls, own = METHODS[name]
    settings = {"T": T, **own, **settings}
    if "inner_optimizer" not in settings:
        settings.setdefault("update_fn", update_fn)
    return cls(**settings)


def start(dtype=jnp.float32):
    params = {"w": jnp.array([1.0, -2.0], dtype)}
    lam = {"rate": jnp.array(-2.0, dtype), "scale": jnp.array(0.1, dtype)}
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
