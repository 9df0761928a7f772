"""All of a validation set at every step: by a function, by a `Resident` that draws, by a whole one.

Softmax regression on 10,000 examples of 784 numbers (30 MiB of noise) for validation, batches of
100 for training, episodes of T = 20 steps. Each line is a process of its own; memory is the peak of
the process beyond what it had when its task was made, time the median of three episodes after one
that compiles.

    python benchmarks/full_validation.py        # some two minutes
"""

import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh

EXAMPLES, FEATURES, CLASSES, T = 10_000, 784, 10, 20
METHODS = {
    "one_step": (gh.one_step, "scan"),
    "reverse": (lambda: gh.reverse(T), "scan"),
    "greedy": (lambda: gh.greedy(unroll_steps=T), "scan"),
    "reverse, host": (lambda: gh.reverse(T, loop="host"), "host"),
}
SOURCES = {
    "function": lambda data: lambda: data,
    "Resident(val, n)": lambda data: gh.Resident(data, EXAMPLES),
    "Resident(val)": gh.Resident,
}


def data(seed, examples):
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((examples, FEATURES), np.float32)
    return inputs, generator.integers(0, CLASSES, examples, dtype=np.int32)


def val_loss(w, lam, batch):
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(inputs @ w, labels).mean()


def train_loss(w, lam, batch):
    return val_loss(w, lam, batch) + jnp.exp(lam["log_decay"]) * jnp.sum(w**2)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB


def measure(method, source):
    make, loop = METHODS[method]
    task = gh.Task(
        gh.BilevelProblem(gh.from_optax(train_loss, optax.sgd(0.05)), val_loss),
        np.zeros((FEATURES, CLASSES), np.float32),
        {"log_decay": np.float32(-5.0)},
        train=gh.Resident(data(0, 5000), 100),
        val=SOURCES[source](data(1, EXAMPLES)),
    )
    before, estimator, state, seconds = peak(), make(), None, []
    for _ in range(4):
        began = time.perf_counter()
        state = gh.tune(task, estimator, episodes=1, T=T, lr_hyper=0.1, loop=loop, state=state)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    print(f"| {method} | {source} | {peak() - before:,.0f} | {np.median(seconds[1:]):.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
    else:
        print("| method | val | MiB | s per episode |\n|---|---|---|---|", flush=True)
        for method in METHODS:
            for source in SOURCES:
                subprocess.run([sys.executable, __file__, method, source], check=True)
