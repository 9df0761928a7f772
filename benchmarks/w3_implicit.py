"""W3, implicit differentiation: logistic regression, 7840 weights, 784 log penalties.

2000 examples of 784 features and 10 classes; the hypergradient at the optimum by conjugate
gradients to 1e-6, in float32. The truth is a dense solve in float64; the yardstick the same
CG by hand, with the products of the softmax written out. The same system is also solved with
both losses multiplied by 1e-6 and by 1e6, and by the default solver, which has to be right on
singular systems too and has no bar here.

    python benchmarks/w3_implicit.py --core 0
"""

import functools
import statistics
import tempfile
from pathlib import Path

import _problems
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from _common import Row, arguments, compiled, flops, machine, race, ratio, show, temp

import gradhpo as gh

TOLERANCE, MOST = 1e-6, 1000
TIME_BAR, ERROR_BAR = 1.05, 1e-5
SIZE = (2000, 784, 10, 1000)  # examples, features, classes, validation examples
SMALL = (60, 8, 4, 30)


def cross_entropy(w, batch):
    x, y = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w), y[:, None], 1))


def make_losses(scale=1.0):
    """Training and validation loss, both times `scale`: the hypergradient scales with them."""

    def train_loss(w, lam, batch):
        return scale * (cross_entropy(w, batch) + 0.5 * jnp.vdot(jnp.exp(lam)[:, None] * w, w))

    def judge(w, lam, batch):
        del lam
        return scale * cross_entropy(w, batch)

    return train_loss, judge


# -- by hand ----------------------------------------------------------------


def by_hand(w, lam, train, val):
    x, _ = train
    P, penalty = jax.nn.softmax(x @ w), jnp.exp(lam)[:, None]

    def product(v):
        z = P * (x @ v)
        return x.T @ (z - P * z.sum(1, keepdims=True)) / x.shape[0] + penalty * v

    b = jax.grad(cross_entropy)(w, val)
    bb = jnp.vdot(b, b)

    def going(carry):
        *_, rr, k = carry
        return (rr > TOLERANCE**2 * bb) & (k < MOST)

    def body(carry):
        u, r, p, rr, k = carry
        q = product(p)
        rate = rr / jnp.vdot(p, q)
        u, r = u + rate * p, r - rate * q
        rr, before = jnp.vdot(r, r), rr
        return u, r, r + rr / before * p, rr, k + 1

    u, *_, k = jax.lax.while_loop(going, body, (jnp.zeros_like(b), b, b, bb, 0))
    return -jnp.sum(u * w * penalty, 1), k


# -- ours ----------------------------------------------------------------


def ours(scale, solver, w, lam, train, val):
    """One outer update's estimate: an inner step (of rate 0), the solve and its check."""
    train_loss, judge = make_losses(scale)
    problem = gh.BilevelProblem(gh.from_optax(train_loss, optax.sgd(0.0)), judge)
    estimator = gh.implicit(1, solver, warm_start=False)
    inner = problem.dynamics.init(w, lam)
    window = jax.tree.map(lambda x: x[None], gh.Window(train, val))
    memory = estimator.init(inner, lam, window)
    got = estimator.estimate(problem, memory, inner, lam, window)
    return got.hypergrad, got.info["linear_iterations"], got.info["linear_residual"]


def solver_alone(w, lam, train, val):
    """Our CG on the same products as by hand; like `by_hand` otherwise."""
    x, _ = train
    P, penalty = jax.nn.softmax(x @ w), jnp.exp(lam)[:, None]

    def product(v):
        z = P * (x @ v)
        return x.T @ (z - P * z.sum(1, keepdims=True)) / x.shape[0] + penalty * v

    b = jax.grad(cross_entropy)(w, val)
    found = gh.cg(TOLERANCE, MOST)(product, b, jnp.zeros_like(b), jax.random.key(0), "scan")
    return -jnp.sum(found.u * w * penalty, 1), found.iterations


CG = gh.cg(TOLERANCE, MOST)
METHODS = {
    "by hand": by_hand,
    "cg alone": solver_alone,
    "implicit": functools.partial(ours, 1.0, CG),
    "implicit, default": functools.partial(ours, 1.0, gh.minres(TOLERANCE, MOST)),
}


def shapes(size=SIZE):
    examples, features, classes, judges = size
    shape = jax.ShapeDtypeStruct

    def side(n):
        return shape((n, features), jnp.float32), shape((n,), jnp.int32)

    w, lam = shape((features, classes), jnp.float32), shape((features,), jnp.float32)
    return w, lam, side(examples), side(judges)


def figures(size=SIZE):
    """Flops with the solver's loop counted once: what stands around it shows."""
    found = {}
    for name, method in METHODS.items():
        program = compiled(method, *shapes(size))
        found[f"w3/{name}/flops"] = flops(program)
        found[f"w3/{name}/temp"] = temp(program)
    return found


# -- measuring ----------------------------------------------------------------


def main():
    args = arguments(__doc__)
    print(machine())
    z = _problems.logistic_optimum(*(SMALL if args.small else SIZE))
    truth = z["hypergrad"]
    pairs = [(jnp.asarray(z[a]), jnp.asarray(z[b])) for a, b in (("x", "y"), ("xv", "yv"))]
    problem = (jnp.asarray(z["W"], jnp.float32), jnp.asarray(z["lam"], jnp.float32), *pairs)
    methods = {
        **METHODS,
        "implicit, losses x 1e-6": functools.partial(ours, 1e-6, CG),
        "implicit, losses x 1e6": functools.partial(ours, 1e6, CG),
    }
    scales = dict.fromkeys(methods, 1.0) | dict(zip(list(methods)[-2:], (1e-6, 1e6), strict=True))
    programs = {name: compiled(f, *problem) for name, f in methods.items()}
    runs = {
        name: functools.partial(lambda program: jax.block_until_ready(program(*problem)), program)
        for name, program in programs.items()
    }
    seconds = race(runs, args.rounds)
    rows = []
    for name, run in runs.items():
        hypergrad, iterations, *_ = run()
        bar = TIME_BAR if name in ("cg alone", "implicit") else None
        if name != "by hand":
            paced = ratio(seconds[name], seconds["by hand"])
            rows.append(Row(name, "time / by hand", paced, bar))
        bar = None if name == "implicit, default" else ERROR_BAR
        rows.append(Row(name, "error", _error(hypergrad, truth, scales[name]), bar))
        rows.append(Row(name, "iterations", float(iterations)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **z)
        yardstick = statistics.median(seconds["by hand"])
        for found in peers.ask("jaxopt", "w3_jaxopt.py", path, args.rounds):
            name = f"jaxopt, {found['solver']}"
            rows.append(
                Row(name, "time / by hand", statistics.median(found["seconds"]) / yardstick)
            )
            rows.append(Row(name, "error", found["error"]))
    show("W3, implicit differentiation, 7840 weights, 784 hyperparameters", rows)


def _error(hypergrad, truth, scale=1.0):
    return float(
        np.linalg.norm(np.asarray(hypergrad, float) / scale - truth) / np.linalg.norm(truth)
    )


if __name__ == "__main__":
    main()
