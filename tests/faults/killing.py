"""Trainings killed at random moments by SIGKILL, and whether what is resumed is what was never
killed, bit for bit: its state and its logs. A run that is killed before its first checkpoint begins
anew, and the records that it left in its logs stay: states alone are compared then.

    python tests/faults/killing.py METHOD [--kills 50] [--seed 0] [--often]

JAX is imported once and started in forked children alone: a fork costs milliseconds, an import
seconds. Every kill is followed by a run to the end in a new process; with --often that one may be
killed as well, again and again. Loops and sources of data take turns.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401  (the compiler of the tests)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import gradhpo  # noqa: E402
import gradhpo.checkpoint.arrays  # noqa: E402
from gradhpo import (  # noqa: E402
    BilevelProblem,
    Resident,
    Task,
    checkpoint,  # noqa: E402
    from_optax,
)
from gradhpo.checkpoint import Checkpoints  # noqa: E402
from gradhpo.datasets import batches, from_loader  # noqa: E402
from gradhpo.transforms import reversible_sgd  # noqa: E402
from gradhpo.utils.logging import CSVLogger, JSONLinesLogger, MultiLogger  # noqa: E402

gradhpo.checkpoint.arrays.require_orbax()
EPISODES, T, N = 8, 6, 64


def sgd(lam):
    return optax.sgd(jnp.exp(lam["rate"]))


def reversed_sgd(lam):
    return reversible_sgd(jnp.exp(lam["rate"]), momentum=0.9)


def by_itself(lam):
    """SABA tunes what moves the minimum, and no rate."""
    return optax.sgd(0.05)


def row_of(batch):
    return batch[0][0, -1].astype(jnp.int32)


METHODS = {  # the estimator by the kind of loop, the optimizer, examples of a batch
    "hyperdistill": (lambda loop: gradhpo.hyperdistill(loop=loop), sgd, 8),
    "reverse": (lambda loop: gradhpo.reverse(T, memory="segments", loop=loop), sgd, 8),
    "saba": (lambda loop: gradhpo.saba(N, N, 0.01, index=row_of), by_itself, 1),
    "reversible": (lambda loop: gradhpo.reversible(T, loop=loop), reversed_sgd, 8),
}
CASES = (("resident", "scan"), ("batches", "host"), ("loader", "unroll"), ("function", "scan"))


def train_loss(w, lam, batch):
    x, y = batch
    logits = jnp.tanh(x[:, :8] @ w["in"]) @ w["out"]
    penalty = jnp.exp(lam["decay"]) * optax.tree.norm(w, squared=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + penalty


def val_loss(w, lam, batch):
    return train_loss(w, {"decay": -20.0}, batch)


def examples(seed):
    """Inputs, the number of the row in their last column, and labels."""
    x = np.random.default_rng(seed).standard_normal((N, 9)).astype(np.float32)
    x[:, 8] = np.arange(N)
    return x, (x[:, 0] > x[:, 1]).astype(np.int32)


def source(kind, seed, size):
    data, draw = examples(seed), np.random.default_rng(seed)
    if kind == "resident":
        return Resident(data, size, seed=seed)
    if kind == "batches":
        return batches(data, size, seed=seed)
    if kind == "loader":

        def epoch():  # shuffles that follow one another
            for rows in np.split(draw.permutation(N), N // size):
                yield data[0][rows], data[1][rows]

        return from_loader(epoch)

    def batch():
        rows = draw.integers(0, N, size)
        return data[0][rows], data[1][rows]

    return batch


def train(method, case, directory):
    """Train to the end, or on from where the directory says; digests of the state and its logs."""
    make, optimizer, size = METHODS[method]
    kind, loop = CASES[case]
    draw = np.random.default_rng(1)
    weights = {
        "in": draw.standard_normal((8, 16)).astype(np.float32) / 4,
        "out": draw.standard_normal((16, 2)).astype(np.float32) / 4,
    }
    problem = BilevelProblem(from_optax(train_loss, optimizer), val_loss)
    lam = {"rate": jnp.float32(-3.0), "decay": jnp.float32(-4.0)}
    if method == "saba":
        del lam["rate"]
    task = Task(problem, weights, lam, source(kind, 1, size), source(kind, 2, size))
    logger = MultiLogger(CSVLogger(directory / "log.csv"), JSONLinesLogger(directory / "log.jsonl"))
    with logger, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = gradhpo.tune(
            task,
            make(loop),
            optax.adam(0.05),
            episodes=EPISODES,
            T=T,
            estimation_period=3,
            loop=loop,
            logger=logger,
            checkpoint=Checkpoints(directory=directory / "checkpoints", seconds=0),
        )
    found, logged = hashlib.sha256(), hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(f"{path}{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    for log in ("log.csv", "log.jsonl"):
        logged.update((directory / log).read_bytes())
    return f"{found.hexdigest()} {logged.hexdigest()}"


def child(method, case, directory):
    """A process that trains, and writes the digest of its end."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        (directory / "end").write_text(train(method, case, directory))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def to_the_end(method, case, directory):
    status = os.waitpid(child(method, case, directory), 0)[1]
    if status:
        raise RuntimeError(f"{method}, case {case}: the process ended with {status}")
    return (directory / "end").read_text().split()


def killed(method, case, directory, saves, chance):
    """Kill a training some time after so many checkpoints of its own, or at its start; whether it
    was still on."""
    before = checkpoint.steps(directory / "checkpoints")[-1:]
    pid, seen = child(method, case, directory), 0
    while seen < saves and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
        now = checkpoint.steps(directory / "checkpoints")[-1:]
        seen, before = seen + (now != before), now
    time.sleep(chance.uniform(0.0, 0.05 if saves else 2.0))
    try:
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    except (ChildProcessError, ProcessLookupError):  # it had ended
        return False


def main():
    options = argparse.ArgumentParser()
    options.add_argument("method", choices=METHODS)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--often", action="store_true")
    options = options.parse_args()
    chance = np.random.default_rng(options.seed)
    whole, kills, same, reached = {}, 0, 0, []
    case = 0
    while kills < options.kills:
        case = (case + 1) % len(CASES)
        room = Path(tempfile.mkdtemp())
        if case not in whole:
            whole[case] = to_the_end(options.method, case, room)  # compiles
            shutil.rmtree(room)
            room.mkdir()
        mine, most, anew = 0, EPISODES if not options.often else 4, False
        while killed(options.method, case, room, chance.integers(0, most), chance):
            mine += 1
            there = checkpoint.steps(room / "checkpoints")[-1:]
            reached += there
            anew = anew or not there
            if not options.often:
                break
        if mine:
            kills += mine
            found = to_the_end(options.method, case, room)
            good = found[0] == whole[case][0] and (anew or found[1] == whole[case][1])
            same += mine * good
            if not good:
                print(f"case {case} differs: {room}", flush=True)
                continue
        shutil.rmtree(room)
    print(
        f"{options.method}: {same} of {kills} identical; {len(reached)} killed after their first "
        f"checkpoint, at {len(set(reached))} different steps"
    )
    return same != kills


if __name__ == "__main__":
    sys.exit(main())
