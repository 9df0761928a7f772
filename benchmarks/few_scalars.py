"""Three scalars: reverse mode against random search and TPE at equal numbers of training runs.

A network 64-64-10 on 300 handwritten digits, trained for 100 steps of SGD with momentum. Tuned are
the log learning rate, the log L2 penalty and the logit of the momentum, by the loss on 300
validation digits at the end of a run. Every method gets the same number of training runs: reverse
mode one hypergradient each (which costs some three plain runs more), the searches one draw each
from the box that reverse mode's start is drawn from as well. What counts is the lowest validation
loss found so far, and the test loss there.

    python benchmarks/few_scalars.py            # TPE too where optuna is installed
"""

import argparse
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import datasets
from gradhpo.report.intervals import interval

STEPS, BATCH = 100, 50
LOW = {"log_lr": np.log(1e-4), "log_l2": np.log(1e-7), "logit_momentum": -3.0}
HIGH = {"log_lr": np.log(1.0), "log_l2": np.log(1e-1), "logit_momentum": 4.0}


def val_loss(w, lam, batch):
    images, labels = batch
    scores = jax.nn.relu(images.reshape(len(images), -1) @ w["hidden"]) @ w["out"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def train_loss(w, lam, batch):
    return val_loss(w, lam, batch) + jnp.exp(lam["log_l2"]) * optax.tree.norm(w, squared=True)


def optimizer(lam):
    return optax.sgd(jnp.exp(lam["log_lr"]), momentum=jax.nn.sigmoid(lam["logit_momentum"]))


DYNAMICS = gh.from_optax(train_loss, optimizer)


@functools.cache
def programs():
    problem = gh.BilevelProblem(DYNAMICS, val_loss)
    method = gh.reverse(STEPS)

    def judge(w, lam, index, train, val, test):
        """`(validation loss, test loss, hypergradient)` of one training run."""
        batches = jax.tree.map(lambda x: x[index], train)
        window = gh.Window(batches, jax.tree.map(lambda x: x[None].repeat(STEPS, 0), val))
        got = method.estimate(problem, (), DYNAMICS.init(w, lam), lam, window)
        return got.info["val_loss"], val_loss(got.inner.params, lam, test), got.hypergrad

    return jax.jit(judge)


def problem(seed):
    """Data, initial weights, and the batches of every run, which are the same for all methods."""
    parts = datasets.split(datasets.digits().train, (300, 300, 1000), seed=seed)
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    w = {"hidden": np.float32(normal((64, 64)) / 8), "out": np.float32(normal((64, 10)) / 8)}
    index = rng.integers(0, 300, (STEPS, BATCH))
    data = [tuple(jnp.asarray(x) for x in part) for part in parts]
    return functools.partial(run_once, programs(), w, index, *data)


def run_once(judge, w, index, train, val, test, lam):
    lam = {name: jnp.float32(x) for name, x in lam.items()}
    loss, on_test, h = judge(w, lam, index, train, val, test)
    loss, on_test = float(loss), float(on_test)
    return loss if np.isfinite(loss) else np.inf, on_test, h


def draw(rng):
    return {name: rng.uniform(LOW[name], HIGH[name]) for name in LOW}


def by_reverse(run, rng, runs):
    lam = {name: jnp.float32(x) for name, x in draw(rng).items()}
    outer = optax.adam(0.3)
    slots, seen = outer.init(lam), []
    for _ in range(runs):
        loss, on_test, h = run(lam)
        seen.append((loss, on_test))
        if all(np.isfinite(x) for x in jax.tree.leaves(h)):
            updates, slots = outer.update(h, slots, lam)
            lam = optax.apply_updates(lam, updates)
    return seen


def by_random_search(run, rng, runs):
    return [run(draw(rng))[:2] for _ in range(runs)]


def by_tpe(run, rng, runs):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(rng.integers(1 << 30))))
    seen = []
    for _ in range(runs):
        trial = study.ask()
        lam = {name: trial.suggest_float(name, LOW[name], HIGH[name]) for name in LOW}
        loss, on_test, _ = run(lam)
        seen.append((loss, on_test))
        study.tell(trial, min(loss, 1e6))
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="training runs of every method")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    methods = {"reverse": by_reverse, "random search": by_random_search, "TPE": by_tpe}
    if importlib.util.find_spec("optuna") is None:
        del methods["TPE"]
        print("TPE skipped: pip install optuna")
    best = {name: [] for name in methods}
    for seed in range(args.seeds):
        run = problem(seed)
        for name, method in methods.items():
            seen = np.array(method(run, np.random.default_rng(1000 + seed), args.runs))
            best[name].append(seen[np.argmin(seen[:, 0])])
    print(f"{args.seeds} seeds, {args.runs} runs each; paired differences with 95 % intervals")
    reverse = np.array(best["reverse"])
    for name, pairs in best.items():
        pairs = np.array(pairs)
        line = f"{name:14s} validation {pairs[:, 0].mean():.3f}  test {pairs[:, 1].mean():.3f}"
        if name != "reverse":
            found = interval(pairs[:, 0] - reverse[:, 0])
            low, high = found.ci95
            line += f"  minus reverse {found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(line)


if __name__ == "__main__":
    main()
