"""W1 with the public gradhpo 0.1.3: `python w1_gradhpo.py one_step|hyperdistill EPISODES`."""

import json
import sys
import time
import warnings

import _problems
import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.algorithms.baselines import OneStepOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer

T, BATCH, RATE = 20, 128, 3e-3


def loss(w, lam, batch):
    x, y = batch
    logits = jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=-1))


def phi(w, lam, batch):
    g = jax.grad(loss)(w, lam, batch)
    return jax.tree.map(lambda w, r, g: w - jax.nn.softplus(r) * g, w, lam, g)


def main(method, episodes):
    warnings.simplefilter("ignore")
    train, val, _, _, w = _problems.tutorial(1, T, BATCH)
    train, val, w = jax.tree.map(jnp.asarray, (train, val, w))
    lam = jax.tree.map(lambda x: jnp.full_like(x, np.log(np.expm1(0.05))), w)
    rng = np.random.default_rng(0)

    def source(data):
        rows = rng.integers(0, len(data[0]), BATCH)
        return data[0][rows], data[1][rows]

    if method == "one_step":
        optimizer, steps = OneStepOptimizer(update_fn=phi), (T,)
    else:
        optimizer, steps = OnlineHypergradientOptimizer(update_fn=phi, T=T, gamma=0.99), ()
    start = time.process_time()
    state = optimizer.run(
        optimizer.init(w, lam),
        episodes,
        *steps,
        lambda: source(train),
        lambda: source(val),
        loss,
        loss,
        lr_reptile=1.0,
        lr_hyper=RATE,
    )
    jax.block_until_ready(state.params)
    seconds = (time.process_time() - start) / (episodes * T)
    print(json.dumps({"seconds_per_step": seconds, "episodes": episodes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
