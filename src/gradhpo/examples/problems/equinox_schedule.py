"""Equinox with AdamW: the peak and the warm-up of a cosine schedule, and the weight decay.

    gradhpo tune gradhpo.examples.problems.equinox_schedule:task --method reverse --seeds 5 \
        --episodes 10 --steps 300 --outer-rate 0.2

An episode is a whole training, from new weights; the schedule begins anew with it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import gradhpo as gh
from gradhpo import datasets, spaces
from gradhpo.schedules import warmup_cosine

STEPS = 300  # of a training: --steps


def net(key):
    return eqx.partition(eqx.nn.MLP(64, 10, 64, depth=2, key=key), eqx.is_inexact_array)


STATIC = net(jax.random.key(0))[1]


def val_loss(params, lam, batch):
    images, labels = batch
    scores = jax.vmap(eqx.combine(params, STATIC))(images.reshape(len(images), -1))
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return loss, {"accuracy": jnp.mean(scores.argmax(-1) == labels)}


def optimizer(lam):
    rate = warmup_cosine(lam["peak"], lam["warmup"], STEPS)
    return optax.adamw(rate, weight_decay=lam["decay"], eps_root=1e-8)


PROBLEM = gh.BilevelProblem(
    gh.from_optax(val_loss, optimizer),
    val_loss,
    begin=lambda params, lam, key: gh.Start(net(key)[0]),
)


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    return gh.Task(
        PROBLEM,
        net(jax.random.key(seed))[0],
        {"peak": 1e-3, "warmup": STEPS / 10, "decay": 1e-2},
        train=gh.Resident(train, 50, seed=2 * seed),
        val=gh.Resident(val, 100, seed=2 * seed + 1),
        space={
            "peak": spaces.log(),
            "warmup": spaces.interval(1, STEPS / 2),
            "decay": spaces.log(),
        },
        test=test,
    )
