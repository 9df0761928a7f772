"""One small problem for the faults of the interface, and the public ways into the library."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo.algorithms import METHODS

T = 4


def train_loss(w, lam, batch):
    pull = 0.1 * jnp.exp(jnp.sum(lam["rate"])) * jnp.sum(w["w"] ** 2)
    return jnp.mean((w["w"] - batch) ** 2) * jnp.exp(jnp.sum(lam["scale"])) / 2 + pull


def val_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + 0.1 * jnp.sin(jnp.sum(lam["rate"] + lam["scale"]))


LOSSES = train_loss, val_loss


@cache
def rated_by(optimizer):
    """A factory of this optimizer at a learning rate that is tuned; the same one every time."""
    return lambda lam: optimizer(jnp.exp(jnp.sum(lam["rate"])))


rated = rated_by(optax.sgd)


def start(name=None, dtype=np.float32):
    """Weights and hyperparameters; those of a schedule in pieces have one piece."""
    shape = (1,) if name == "fds" else ()
    lam = {"rate": np.full(shape, -2.0, dtype), "scale": np.full(shape, 0.1, dtype)}
    return {"w": np.array([1.0, -2.0], dtype)}, lam


def batch(seed, n=4):
    return np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32)


def method(name="one_step", **settings):
    """A method of the registry; the inner optimizer's rate is tuned."""
    entry = METHODS[name]
    default = {"T": T, "inner_optimizer": rated_by(entry.example.trained_by or optax.sgd)}
    if "update_fn" in settings:
        del default["inner_optimizer"]
    return entry.make(**{**default, **entry.example.of_class, **settings})


def step(opt, state, losses=LOSSES, seed=0):
    rate = None if opt.outer_optimizer is not None else 0.1
    return opt.step(state, batch(seed), batch(seed + 100), *losses, lr_hyper=rate)


def run(opt, state, losses=LOSSES, M=1, train=None, **more):
    return opt.run(
        state,
        M,
        get_train_batch=train or gh.Resident(batch(1, 20), 4),
        get_val_batch=gh.Resident(batch(2, 20), 4, seed=1),
        train_loss_fn=losses[0],
        val_loss_fn=losses[1],
        lr_hyper=0.1,
        **more,
    )


def task(losses=LOSSES, lam=None, **more):
    problem = gh.BilevelProblem(gh.from_optax(losses[0], rated), losses[1])
    params, default = start()
    sources = gh.Resident(batch(1, 20), 4), gh.Resident(batch(2, 20), 4, seed=1)
    return gh.Task(problem, params, default if lam is None else lam, *sources, **more)


def by_step(losses, opt=None, params=None, lam=None):
    opt = opt or method()
    return step(opt, opt.init(params or start()[0], lam or start()[1]), losses)


def by_hypergradient(losses, opt=None, params=None, lam=None):
    opt = opt or method()
    state = opt.init(params or start()[0], lam or start()[1])
    return opt.compute_hypergradient(state, batch(0), batch(1), *losses)


def by_run(losses, opt=None, params=None, lam=None):
    opt = opt or method()
    return run(opt, opt.init(params or start()[0], lam or start()[1]), losses)


def by_tune(losses, params=None, lam=None):
    posed = task(losses).replace(params=params or start()[0], hyperparams=lam or start()[1])
    return gh.tune(posed, ONE_STEP, episodes=1, T=T, lr_hyper=0.1)


def by_functions(losses, params=None, lam=None):
    problem = gh.BilevelProblem(gh.from_optax(losses[0], rated), losses[1])
    state = gh.init_state(problem, ONE_STEP, None, params or start()[0], lam or start()[1])
    window = gh.Window(batch(0)[None], batch(1)[None])
    step = partial(gh.bilevel_step(ONE_STEP), problem)
    return jax.jit(step)(state, window, 0.1)


ONE_STEP = gh.one_step()
DOORS = {
    "step": by_step,
    "compute_hypergradient": by_hypergradient,
    "run": by_run,
    "tune": by_tune,
    "functions": by_functions,
}
"""All that take losses: `DOORS[name](losses, params=, lam=)`."""
CLASSES = ("step", "compute_hypergradient", "run")
