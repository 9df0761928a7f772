"""W5, a convolutional net on CPU: one outer step relative to a bare training step.

28x28 images, four stride-2 3x3 convolutions of 32 channels, batch 100. Hyperparameters are
one log learning rate per parameter ("rates") or one weight per training example ("weights",
1000). On CPU a convolution inside a compiled loop is 15-20 times slower than outside it, so
the yardstick is a Python loop around a jitted step, and ours the class with `loop="auto"`.

    python benchmarks/w5_convolution.py --core 0
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import Row, arguments, compiled, flops, machine, race, ratio, show

import gradhpo as gh

BATCH, EXAMPLES, STEPS, RATE, GAMMA, INNER = 100, 1000, 10, 1e-2, 0.99, 0.05
KINDS = ("rates", "weights")
FLOP_BARS = {
    "one_step": {"rates": 2.05, "weights": 2.7},
    "hyperdistill": {"rates": 3.05, "weights": 3.05},
}
TIME_BAR = 1.1
CHANNELS = (1, 32, 32, 32, 32)


def make_problem(kind):
    """`(train set, validation set, weights, hyperparameters)`; train examples know their index."""
    rng = np.random.default_rng(0)

    def images():
        x = rng.standard_normal((EXAMPLES, 28, 28, 1), np.float32)
        return jnp.asarray(x), jnp.asarray(rng.integers(0, 10, EXAMPLES, dtype=np.int32))

    train, val = images(), images()
    w = []
    for a, b in zip(CHANNELS[:-1], CHANNELS[1:], strict=True):
        kernel = rng.standard_normal((3, 3, a, b), np.float32) * np.float32(np.sqrt(2 / (9 * a)))
        w.append((jnp.asarray(kernel), jnp.zeros(b)))
    w.append((jnp.asarray(0.1 * rng.standard_normal((128, 10), np.float32)), jnp.zeros(10)))
    rates = jax.tree.map(lambda x: jnp.full_like(x, -3.0), w)
    lam = rates if kind == "rates" else jnp.zeros(EXAMPLES)
    return (*train, jnp.arange(EXAMPLES)), val, w, lam


def losses(w, x, y):
    for kernel, bias in w[:-1]:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + bias)
    weight, bias = w[-1]
    scores = jax.nn.log_softmax(x.reshape(x.shape[0], -1) @ weight + bias)
    return -jnp.take_along_axis(scores, y[:, None], 1)[:, 0]


def judge(w, lam, batch):
    del lam
    return losses(w, *batch).mean()


def plain_loss(w, lam, batch):
    del lam
    return losses(w, *batch[:2]).mean()


def weighted_loss(w, lam, batch):
    x, y, index = batch
    return jnp.mean(2 * jax.nn.sigmoid(lam[index]) * losses(w, x, y))


TRAIN_LOSS = {"rates": plain_loss, "weights": weighted_loss}


def phi_rates(w, lam, batch):
    g = jax.grad(plain_loss)(w, lam, batch)
    return jax.tree.map(lambda w, r, g: w - jnp.exp(r) * g, w, lam, g)


def phi_weights(w, lam, batch):
    g = jax.grad(weighted_loss)(w, lam, batch)
    return jax.tree.map(lambda w, g: w - INNER * g, w, g)


PHI = {"rates": phi_rates, "weights": phi_weights}


# -- by hand ----------------------------------------------------------------


def mixed(kind, w, lam, batch, alpha):
    """`alpha dPhi/dlam` at w; for weights by one forward derivative of the losses."""
    if kind == "rates":
        return jax.vjp(lambda lam: phi_rates(w, lam, batch), lam)[1](alpha)[0]
    x, y, index = batch
    slopes = jax.jvp(lambda w: losses(w, x, y), (w,), (alpha,))[1]
    weight = jax.nn.sigmoid(lam[index])
    share = -INNER * 2 * weight * (1 - weight) * slopes / len(y)
    return jnp.zeros_like(lam).at[index].add(share)


def bare(kind, state, window):
    return (PHI[kind](*state[:2], window.train), *state[1:])


def hand(kind, distill, state, window):
    w, lam, w_star, weight = state
    weight = GAMMA * weight + 1
    point = w
    if distill:
        w_star = point = jax.tree.map(lambda a, b: a + (b - a) / weight, w_star, w)
    w = PHI[kind](w, lam, window.train)
    alpha = jax.grad(judge)(w, lam, window.val)
    h = mixed(kind, point, lam, window.train, alpha)
    scale = RATE * weight if distill else RATE
    return w, jax.tree.map(lambda x, h: x - scale * h, lam, h), w_star, weight


def hand_loop(kind, step, problem, rows):
    train, val, w, lam = problem

    def fetched(state, window, train, val):
        window = gh.Window(*(_take(side, i) for side, i in zip((train, val), window, strict=True)))
        return step(state, window)

    compiled_step = jax.jit(fetched)

    def run():
        state = (w, lam, w, jnp.zeros(()))
        for t in range(STEPS):
            state = compiled_step(state, gh.Window(rows.train[t], rows.val[t]), train, val)
        return jax.block_until_ready(state)

    return run


def _take(side, rows):
    return jax.tree.map(lambda x: x[rows], side)


# -- ours ----------------------------------------------------------------


def dynamics(kind, known=True):
    """Weights: an Optax optimizer on the training loss, or (`known=False`) an opaque step."""
    if kind == "weights" and known:
        return gh.from_optax(weighted_loss, optax.sgd(INNER))
    return gh.from_update(PHI[kind])


ESTIMATORS = {"one_step": gh.one_step(), "hyperdistill": gh.hyperdistill(GAMMA, theta=1.0)}


def optimizers(kind):
    if kind == "weights":
        settings = {"inner_optimizer": optax.sgd(INNER), "T": STEPS}
    else:
        settings = {"update_fn": PHI[kind], "T": STEPS}
    distill = functools.partial(gh.OnlineHypergradientOptimizer, gamma=GAMMA, theta=1.0)
    return {"one_step": gh.OneStepOptimizer(**settings), "hyperdistill": distill(**settings)}


def our_run(kind, optimizer, problem):
    train, val, w, lam = problem
    sources = [gh.Resident(side, BATCH) for side in (train, val)]
    state = optimizer.init(w, lam)

    def run():
        end = optimizer.run(
            state,
            1,
            get_train_batch=sources[0],
            get_val_batch=sources[1],
            train_loss_fn=TRAIN_LOSS[kind],
            val_loss_fn=judge,
            lr_hyper=RATE,
        )
        return jax.block_until_ready(end)

    return run


def figures():
    found = {}
    for kind in KINDS:
        train, val, w, lam = make_problem(kind)
        window = gh.Window(*(_take(side, slice(0, BATCH)) for side in (train, val)))
        stacked = jax.tree.map(lambda x: x[None], window)
        state = (w, lam, w, jnp.zeros(()))
        found[f"w5/{kind}/bare/flops"] = flops(
            compiled(functools.partial(bare, kind), state, window)
        )
        for name, estimator in ESTIMATORS.items():
            step = functools.partial(hand, kind, name == "hyperdistill")
            found[f"w5/{kind}/{name}, by hand/flops"] = flops(compiled(step, state, window))
            for known in (True, False) if kind == "weights" else (True,):
                problem = gh.BilevelProblem(dynamics(kind, known), judge, TRAIN_LOSS[kind])
                ours = functools.partial(gh.bilevel_step(estimator), problem, lr_hyper=RATE)
                start = gh.init_state(problem, estimator, None, w, lam, stacked)
                label = name if known else f"{name}, opaque"
                found[f"w5/{kind}/{label}/flops"] = flops(compiled(ours, start, stacked))
    return found


# -- measuring ----------------------------------------------------------------


def report(kind, found, rounds):
    problem = make_problem(kind)
    rng = np.random.default_rng(1)
    rows_of = gh.Window(*(rng.integers(0, EXAMPLES, (STEPS, BATCH), dtype=np.int32) for _ in "tv"))
    runs = {"bare": hand_loop(kind, functools.partial(bare, kind), problem, rows_of)}
    for name, optimizer in optimizers(kind).items():
        step = functools.partial(hand, kind, name == "hyperdistill")
        runs[f"{name}, by hand"] = hand_loop(kind, step, problem, rows_of)
        runs[name] = our_run(kind, optimizer, problem)
    seconds = race(runs, rounds)
    rows = [Row("bare", "ms per step", 1e3 * statistics.median(seconds["bare"]) / STEPS)]
    bare_flops = found[f"w5/{kind}/bare/flops"]
    for key, value in found.items():
        _, of, name, _ = key.split("/")
        if of == kind and name != "bare":
            bar = FLOP_BARS[name.split(",")[0]][kind]
            rows.append(Row(name, "flops / bare step", value / bare_flops, bar))
    for name in runs:
        if name != "bare":
            rows.append(Row(name, "time / bare step", ratio(seconds[name], seconds["bare"])))
    for name in ESTIMATORS:
        paced = ratio(seconds[name], seconds[f"{name}, by hand"])
        rows.append(Row(name, "time / by hand", paced, TIME_BAR))
    show(f"W5 {kind}", rows)


def main():
    args = arguments(__doc__)
    print(machine())
    found = figures()
    for kind in KINDS:
        report(kind, found, 1 if args.small else args.rounds)


if __name__ == "__main__":
    main()
