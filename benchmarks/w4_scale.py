"""W4, as many hyperparameters as parameters: one outer step relative to a plain SGD step.

MLP without biases, batch 32, one log learning rate per parameter, donated state. Ours is
`bilevel_step` with everything on: guard, status, norms. N goes up to 1e7, with --huge to 1e8
(about 5 GiB).

    python benchmarks/w4_scale.py --core 0
    python benchmarks/w4_scale.py --core 0 --huge
"""

import functools
import gc
import math
import statistics
import time

import _problems
import jax
import jax.numpy as jnp
from _common import Row, arguments, compiled, flops, machine, show, temp

import gradhpo as gh
from gradhpo.transforms.scaling import scale_by_tree

BATCH, RATE, GAMMA = 32, 1e-2, 0.99
FLOP_BARS = {"one_step": 2.1, "hyperdistill": 3.1}
TIME_BARS = {"one_step": 2.6, "hyperdistill": 3.7}  # at 1e8
COUNTED = 1e6  # N of the committed counts


def layers(n):
    """Shapes of 784-h-h-10 with about n parameters."""
    h = round((-794 + math.sqrt(794**2 + 4 * n)) / 2)
    return [(784, h), (h, h), (h, 10)]


def shapes(n):
    """`(weights, a batch)` as shapes."""
    shape = jax.ShapeDtypeStruct
    batch = shape((BATCH, 784), jnp.float32), shape((BATCH,), jnp.int32)
    return [shape(s, jnp.float32) for s in layers(n)], batch


def loss(w, lam, batch):
    del lam
    x, y = batch
    for layer in w[:-1]:
        x = jax.nn.relu(x @ layer)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w[-1]), y[:, None], 1))


def phi(w, lam, batch):
    g = jax.grad(loss)(w, lam, batch)
    return jax.tree.map(lambda w, r, g: w - jnp.exp(r) * g, w, lam, g)


# -- by hand ----------------------------------------------------------------


def sgd(state, window):
    (w,) = state
    g = jax.grad(loss)(w, None, window.train)
    return (jax.tree.map(lambda w, g: w - 0.05 * g, w, g),)


def hand_one_step(state, window):
    w, lam = state
    move = jax.tree.map(lambda r, g: jnp.exp(r) * g, lam, jax.grad(loss)(w, lam, window.train))
    w = jax.tree.map(jnp.subtract, w, move)
    alpha = jax.grad(loss)(w, lam, window.val)
    return w, jax.tree.map(lambda r, a, m: r + RATE * a * m, lam, alpha, move)


def hand_hyperdistill(state, window):
    w, lam, w_star, weight = state
    weight = GAMMA * weight + 1
    w_star = jax.tree.map(lambda a, b: a + (b - a) / weight, w_star, w)
    rate = jax.tree.map(jnp.exp, lam)
    g = jax.grad(loss)(w, lam, window.train)
    new = jax.tree.map(lambda w, r, g: w - r * g, w, rate, g)
    alpha = jax.grad(loss)(new, lam, window.val)
    g = jax.grad(loss)(w_star, lam, window.train)
    scale = RATE * weight
    lam = jax.tree.map(lambda x, r, a, g: x + scale * a * g * r, lam, rate, alpha, g)
    return new, lam, w_star, weight


# -- ours ----------------------------------------------------------------


def rate_tree(lam):
    return scale_by_tree(jax.tree.map(lambda x: -jnp.exp(x), lam))


PROBLEM = gh.BilevelProblem(gh.from_update(phi), loss, loss)
BY_OPTAX = gh.BilevelProblem(gh.from_optax(loss, rate_tree), loss)
ESTIMATORS = {"one_step": gh.one_step(), "hyperdistill": gh.hyperdistill(GAMMA)}


def ours(problem, estimator, state, window):
    window = jax.tree.map(lambda x: x[None], window)
    return gh.bilevel_step(estimator)(problem, state, window, RATE)


def methods(problem=PROBLEM):
    """name -> (step, maker of its state from fresh weights, log rates and a batch)."""
    found = {
        "sgd": (sgd, lambda w, lam, batch: (w(),)),
        "one_step, by hand": (hand_one_step, lambda w, lam, batch: (w(), lam())),
        "hyperdistill, by hand": (
            hand_hyperdistill,
            lambda w, lam, batch: (w(), lam(), w(), jnp.zeros(())),
        ),
    }
    for name, estimator in ESTIMATORS.items():

        def state(w, lam, batch, estimator=estimator):
            window = jax.tree.map(lambda x: x[None], gh.Window(batch, batch))
            return gh.init_state(problem, estimator, None, w(), lam(), window)

        found[name] = (functools.partial(ours, problem, estimator), state)
    return found


def programs(n, problem=PROBLEM, only=None):
    w, batch = shapes(n)
    window = gh.Window(batch, batch)
    found = {}
    for name, (step, make) in methods(problem).items():
        if only is None or name in only:
            state = jax.eval_shape(lambda w, batch: make(lambda: w, lambda: w, batch), w, batch)  # noqa: B023
            found[name] = compiled(step, state, window, donate=(0,))
    return found


def figures(n=COUNTED):
    found = {}
    for name, program in programs(n).items():
        found[f"w4/{name}/flops"] = flops(program)
        found[f"w4/{name}/temp"] = temp(program)
    for name, program in programs(n, BY_OPTAX, ESTIMATORS).items():
        found[f"w4/{name}, optax/flops"] = flops(program)
    return found


# -- measuring ----------------------------------------------------------------


def counts():
    found = figures()
    rows = []
    for name in (*methods(), *(f"{name}, optax" for name in ESTIMATORS)):
        if name != "sgd":
            value = found[f"w4/{name}/flops"] / found["w4/sgd/flops"]
            rows.append(Row(name, "flops / SGD step", value, FLOP_BARS[name.split(",")[0]]))
    show(f"W4, counts at N = {COUNTED:.0e}", rows)


def report(n, rounds):
    """Donated states, one per method; the methods take turns."""
    shapes_of_w, _ = shapes(n)
    count = sum(math.prod(s.shape) for s in shapes_of_w)
    batches = [_problems.teacher_batches((BATCH,), 784, 10, seed) for seed in (1, 2)]
    window = gh.Window(*jax.tree.map(jnp.asarray, batches))

    @jax.jit
    def weights():
        keys = jax.random.split(jax.random.key(0), len(shapes_of_w))
        return [
            jax.random.normal(key, s.shape) * jnp.sqrt(2 / s.shape[0])
            for key, s in zip(keys, shapes_of_w, strict=True)
        ]

    @jax.jit
    def rates():
        return [jnp.full(s.shape, -3.0) for s in shapes_of_w]

    executables, states, seconds = programs(n), {}, {}
    for name, (_, make) in methods().items():
        # Copies: a fresh memory shares its buffers with the weights, and all are donated.
        state = jax.tree.map(jnp.copy, make(weights, rates, window.train))
        states[name] = jax.block_until_ready(executables[name](state, window))
        seconds[name] = []
        del state
    for _ in range(rounds):
        for name, program in executables.items():
            start = time.process_time()
            states[name] = jax.block_until_ready(program(states[name], window))
            seconds[name].append(time.process_time() - start)
    rows = [Row("sgd", "ms", 1e3 * statistics.median(seconds["sgd"]))]
    for name, program in executables.items():
        if name == "sgd":
            continue
        pairs = zip(seconds[name], seconds["sgd"], strict=True)
        bar = TIME_BARS.get(name) if n >= 1e8 else None
        rows.append(Row(name, "time / SGD step", statistics.median(a / b for a, b in pairs), bar))
        held = sum(x.nbytes for x in jax.tree.leaves(states[name])) / 4 / count
        rows.append(Row(name, "state, floats per parameter", held))
        rows.append(Row(name, "temp, floats per parameter", temp(program) / 4 / count))
    show(f"W4, N = {count:.3g}", rows)
    del states
    gc.collect()


def main():
    args = arguments(__doc__, huge="also 1e8 parameters")
    print(machine())
    counts()
    sizes = [1e4] if args.small else [1e5, 1e6, 1e7] + [1e8] * args.huge
    for n in sizes:
        report(n, args.rounds)


if __name__ == "__main__":
    main()
