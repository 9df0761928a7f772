"""A soak: hours of runs in one process, each with new losses and new arrays, of changing shapes.

Every round makes a problem of its own (a dense or a convolutional network of one of eight shapes,
losses that close over a megabyte of the round's own) and gives it to the next method of
`gradhpo.algorithms.METHODS`, by `run`, by `gradhpo.tune` or by `step`, with `Resident` data,
functions or `InOrder` batches; every tenth problem of `tune` goes through `check_hypergradient`
too. No loss is used twice, so every cache of the library turns over, and whatever keeps a loss, a
program or a state alive shows as memory.

The shapes are eight because JAX keeps what it has traced of its own functions for every shape there
was, without bound; `--shapes 0` draws new ones in every round, and shows that.

Prints a line a minute. The bar: resident memory at the end is below 1.5 times what it was after
the first ten minutes. Exit status 1 if it is not. Linux only (/proc).

    python benchmarks/soak.py                # 2 hours
    python benchmarks/soak.py --hours 0.25
"""

import argparse
import itertools
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo.algorithms import METHODS

BAR, SETTLED = 1.5, 10  # times the memory; minutes
CLASSES = 5
HELD = 1 << 18  # float32 numbers that the losses of a round close over
COMPILED = "/jax/core/compile/backend_compile_duration"


class Round(NamedTuple):
    """A problem that nobody has seen before."""

    params: Any
    hyperparams: Any
    train_loss: Any
    val_loss: Any
    inner: Any
    train: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray]
    batch: int
    T: int


def new_round(number: int, entry: Any, shapes: int) -> Round:
    """Shapes by the number of the round, the values are never the same."""
    rng, trained_by = np.random.default_rng(number), entry.example.trained_by
    shape = number % shapes if shapes else number
    drawn = np.random.default_rng(shape)
    # A quarter convolves: on CPU those are dear to compile, and inside a solver's loop for minutes.
    dense = shape % 4 != 3 or entry.name.startswith("implicit")
    size, width, hidden = (int(n) for n in drawn.integers((6, 2, 4), (12, 5, 24)))
    batch, T = int(drawn.integers(3, 9)), int(drawn.choice([4, 6, 8])) if dense else 4
    features = size * size if dense else size * size * width
    normal = partial(rng.standard_normal, dtype=np.float32)
    params = {"hidden": normal((features, hidden)), "out": normal((hidden, CLASSES))}
    params = {name: w / np.float32(np.sqrt(len(w))) for name, w in params.items()}
    if not dense:
        params["kernel"] = normal((3, 3, 1, width)) / 3
    held, rate = jnp.asarray(normal((HELD,))), float(rng.uniform(0.01, 0.05))

    def scores(w, images):
        x = images[..., None]
        if not dense:
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, w["kernel"], (1, 1), "SAME", dimension_numbers=numbers
            )
        x = jax.nn.softplus(x.reshape(len(x), -1) @ w["hidden"])
        return x @ w["out"] + held[:CLASSES]

    def val_loss(w, lam, batch):
        images, labels = batch
        got = optax.softmax_cross_entropy_with_integer_labels(scores(w, images), labels)
        return got.mean()

    def train_loss(w, lam, batch):
        images, labels = batch
        smoothing = 0.1 * jax.nn.sigmoid(jnp.sum(lam["smoothing"]))
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), smoothing)
        loss = optax.softmax_cross_entropy(scores(w, images), wanted).mean()
        return loss + jnp.exp(jnp.sum(lam["log_l2"])) * optax.tree.norm(w, squared=True)

    def data(examples):
        images = normal((examples, size, size))
        return images, rng.integers(0, CLASSES, examples, dtype=np.int32)

    def inner(lam):
        del lam
        return (trained_by or partial(optax.sgd, momentum=0.5))(rate)

    pieces = (1,) if "pieces" in entry.needs else ()
    lam = {name: np.full(pieces, -4, np.float32) for name in ("log_l2", "smoothing")}
    return Round(params, lam, train_loss, val_loss, inner, data(60), data(batch * 8), batch, T)


def sources(made: Round, kind: int) -> tuple[Any, Any]:
    """Of training and validation batches: on the device, by functions, or in order."""
    if kind == 0:
        train, val = (gh.Resident(data, made.batch, seed=1) for data in (made.train, made.val))
        return train, val
    if kind == 1:

        def drawn(data, seed):
            rng = np.random.default_rng(seed)

            def batch():
                rows = rng.integers(0, len(data[1]), made.batch)
                return jax.tree.map(lambda x: x[rows], data)

            return batch

        return drawn(made.train, 0), drawn(made.val, 1)

    def in_order(data):
        rows = np.arange(2 * made.T * made.batch).reshape(2 * made.T, -1) % len(data[1])
        return gh.InOrder(jax.tree.map(lambda x: x[rows], data))

    return in_order(made.train), in_order(made.val)


def go(number: int, shapes: int) -> None:
    """One round: its problem, by the method and the way that its number says."""
    names = list(METHODS)
    entry = METHODS[names[number % len(names)]]
    turn = number // len(names) + number  # or a method would always meet the same way
    made = new_round(number, entry, shapes)
    optimizer = entry.make(
        T=made.T, inner_optimizer=made.inner, **{**entry.settings, **entry.example.of_class}
    )
    train, val = sources(made, turn % 3)
    losses = {"train_loss_fn": made.train_loss, "val_loss_fn": made.val_loss}
    way = turn // 3 % 3
    if way == 0:
        state = optimizer.init(made.params, made.hyperparams)
        state = optimizer.run(
            state, 2, get_train_batch=train, get_val_batch=val, lr_hyper=0.01, **losses
        )
    elif way == 1:
        dynamics = gh.from_optax(made.train_loss, made.inner)
        problem = gh.BilevelProblem(dynamics, made.val_loss, made.train_loss)
        task = gh.Task(problem, made.params, made.hyperparams, train, val)
        state = gh.tune(
            task, optimizer.method, optax.adam(0.01), episodes=2, T=made.T,
            estimation_period=optimizer.estimation_interval,
        )  # fmt: skip
        if number % 10 == 0:
            gh.check_hypergradient(task, made.T, ["one_step", "reverse"])
    else:
        a, b = (jax.tree.map(lambda x: x[: made.batch], d) for d in (made.train, made.val))
        state = optimizer.init(made.params, made.hyperparams, a)
        for _ in range(3):
            state = optimizer.step(state, a, b, lr_hyper=0.01, **losses)
    jax.block_until_ready(state)


def resident_memory() -> float:
    """Of this process now, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Hours of runs in one process.")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--shapes", type=int, default=8, help="0: new ones in every round")
    options = parser.parse_args()
    warnings.simplefilter("ignore", gh.GradhpoWarning)  # of compiling again: that is the point
    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    print("minute  resident MB  times that of minute 10  rounds  compilations  live arrays, MB")
    began, minutes, now, settled = time.monotonic(), 0, 0.0, float("nan")
    for number in itertools.count():
        go(number, options.shapes)
        passed = (time.monotonic() - began) / 60
        if passed < minutes + 1:
            continue
        minutes = int(passed)
        now, live = resident_memory(), sum(x.nbytes for x in jax.live_arrays()) / 2**20
        if minutes >= SETTLED and np.isnan(settled):
            settled = now
        print(
            f"{minutes:6}  {now:11.0f}  {now / settled:23.3f}  {number + 1:6}  "
            f"{len(compilations):12}  {live:15.1f}",
            flush=True,
        )
        if passed >= 60 * options.hours:
            break
    below = now / settled < BAR
    print(f"{'below' if below else 'NOT below'} {BAR} times: {now / settled:.3f}")
    return not below


if __name__ == "__main__":
    sys.exit(main())
