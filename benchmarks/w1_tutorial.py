"""W1, the tutorial's problem: ours against hand-written JAX, as one program and as a loop.

MLP 10-32-5, one learning rate per parameter (517), T = 20, M = 60, batch 128. The yardsticks
are the same arithmetic written out for this problem alone, without guard, status or metrics:
one `lax.scan` for what we compile as one program, a Python loop around one jitted step for
what we run as such.

    python benchmarks/w1_tutorial.py --core 0
"""

import functools
import statistics
import time
import warnings

import _problems
import jax
import jax.numpy as jnp
import numpy as np
import peers
from _common import Row, arguments, compiled, flops, machine, race, ratio, show

import gradhpo as gh

M, T, BATCH, GAMMA, RATE, PERIOD = 60, 20, 128, 0.99, 3e-3, 10
SCAN_BAR, LOOP_BAR = 1.2, 1.3


def make_problem(episodes=M):
    """Data, index arrays, initial weights and log learning rates, all from one seed."""
    train, val, *rows, w = _problems.tutorial(episodes, T, BATCH)
    data = gh.Window(*jax.tree.map(jnp.asarray, (train, val)))
    w = jax.tree.map(jnp.asarray, w)
    lam = jax.tree.map(lambda x: jnp.full_like(x, np.log(np.expm1(0.05))), w)
    return data, gh.Window(*rows), w, lam


def loss(w, batch):
    x, y = batch
    logits = jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=-1))


def bilevel_loss(w, lam, batch):
    del lam
    return loss(w, batch)


def phi(w, lam, batch):
    g = jax.grad(loss)(w, batch)
    return jax.tree.map(lambda w, r, g: w - jax.nn.softplus(r) * g, w, lam, g)


# -- by hand ----------------------------------------------------------------


def lerp(a, b, t):
    return jax.tree.map(lambda a, b: (1 - t) * a + t * b, a, b)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def take(side, rows):
    return jax.tree.map(lambda x: x[rows], side)


def hand_step(distill, data, carry, rate, theta, rows):
    """One-step, or HyperDistill with D* = D_t, as one would write it for this problem alone."""
    w, lam, w_star, weight = carry
    batch = take(data.train, rows.train)
    weight = GAMMA * weight + 1
    w_star = lerp(w_star, w, 1 / weight) if distill else w
    new = phi(w, lam, batch)
    alpha = jax.grad(loss)(new, take(data.val, rows.val))
    (h,) = jax.vjp(lambda lam: phi(w_star, lam, batch), lam)[1](alpha)
    scale = rate * theta * weight if distill else rate
    return new, jax.tree.map(lambda x, h: x - scale * h, lam, h), w_star, weight


def hand_fit(data, w0, lam, rows):
    """theta, along the line between the ends of an episode."""
    train = rows.train
    w_end, _ = jax.lax.scan(lambda w, i: (phi(w, lam, take(data.train, i)), None), w0, train)
    alpha_end = jax.grad(loss)(w_end, take(data.val, rows.val[-1]))

    def back(carry, x):
        alpha, g, w_star, weight, xy, xx = carry
        beta, i = x
        batch = take(data.train, i)
        line = lerp(w0, w_end, beta)
        alpha, term = jax.vjp(lambda w, lam: phi(w, lam, batch), line, lam)[1](alpha)
        g = jax.tree.map(jnp.add, g, term)
        new = GAMMA * weight + 1
        w_star = lerp(w_star, line, 1 - weight / new)
        (v,) = jax.vjp(lambda lam: phi(w_star, lam, batch), lam)[1](alpha_end)
        return (alpha, g, w_star, new, xy + new * dot(v, g), xx + new**2 * dot(v, v)), None

    start = (alpha_end, jax.tree.map(jnp.zeros_like, lam), w0, 0.0, 0.0, 0.0)
    (*_, xy, xx), _ = jax.lax.scan(back, start, (jnp.arange(T) / T, train), reverse=True)
    return jnp.where(xy > 0, xy / xx, 1.0)


def hand_scan(distill, data, rows, w, lam):
    """The whole run as one program."""

    def episode(carry, x):
        w, lam, theta = carry
        m, rows = x
        rate = RATE * (1 - m / episodes)
        if distill:
            theta = jax.lax.cond(
                m % PERIOD == 0, lambda: hand_fit(data, w, lam, rows), lambda: theta
            )

        def step(carry, rows):
            return hand_step(distill, data, carry, rate, theta, rows), None

        (w, lam, *_), _ = jax.lax.scan(step, (w, lam, w, 0.0), rows)
        return (w, lam, theta), loss(w, data.val)

    episodes = rows.train.shape[0]
    return jax.lax.scan(episode, (w, lam, jnp.float32(1)), (jnp.arange(episodes), rows))


def hand_loop(distill, data, rows, w, lam):
    """The same in Python, around one jitted step."""
    step = jax.jit(functools.partial(hand_step, distill), donate_argnums=1)
    fit = jax.jit(hand_fit)

    def run():
        state = jax.tree.map(jnp.copy, (w, lam))
        theta = np.float32(1)
        for m in range(rows.train.shape[0]):
            rate = np.float32(RATE * (1 - m / rows.train.shape[0]))
            if distill and m % PERIOD == 0:
                theta = fit(data, *state[:2], take(rows, m))
            w_star = jax.tree.map(jnp.copy, state[0]) if distill else ()
            state = (*state[:2], w_star, np.float32(0))
            for t in range(T):
                state = step(data, state, rate, theta, gh.Window(rows.train[m, t], rows.val[m, t]))
                state = state if distill else (*state[:2], (), state[3])
        return state

    return run


# -- ours ----------------------------------------------------------------


def our_scan(optimizer, data, rows, w, lam):
    """The same run as one program of the library."""
    problem = gh.BilevelProblem(gh.from_update(phi), bilevel_loss, bilevel_loss)
    estimator = optimizer.estimator()
    batch = jax.tree.map(lambda x: jnp.zeros((1, BATCH, *x.shape[1:])), data)
    state = gh.init_state(problem, estimator, None, w, lam, batch)
    return gh.run_episodes(
        estimator,
        None,
        problem,
        state,
        rows,
        gh.linear_decay(RATE, rows.train.shape[0]),
        estimation_period=PERIOD,
        resident=data,
        observe=lambda state: loss(state.params, data.val),
    )


def our_class(optimizer, sources, episodes, w, lam):
    return optimizer.run(
        optimizer.init(w, lam),
        episodes,
        get_train_batch=sources[0],
        get_val_batch=sources[1],
        train_loss_fn=bilevel_loss,
        val_loss_fn=bilevel_loss,
        lr_hyper=RATE,
    )


def our_step(optimizer, batches, w, lam):
    """A loop of one's own around the class's `step`; HyperDistill's theta stays 1."""

    def run():
        state = optimizer.init(w, lam)
        for train, val in batches:
            state = optimizer.step(state, train, val, bilevel_loss, bilevel_loss, lr_hyper=RATE)
        return state

    return run


def host_callables(data):
    rng = np.random.default_rng(0)
    sides = [jax.tree.map(np.asarray, side) for side in data]

    def source(side):
        rows = rng.integers(0, len(side[1]), BATCH)
        return side[0][rows], side[1][rows]

    return [functools.partial(source, side) for side in sides]


# -- measuring ----------------------------------------------------------------


def optimizers(**settings):
    distill = functools.partial(
        gh.OnlineHypergradientOptimizer, gamma=GAMMA, estimation_period=PERIOD
    )
    classes = {"one_step": gh.OneStepOptimizer, "hyperdistill": distill}
    return {name: make(update_fn=phi, T=T, **settings) for name, make in classes.items()}


def figures():
    """Flops of one outer step, ours and by hand."""
    data, rows, w, lam = make_problem(1)
    window = gh.Window(*(r[0, :1] for r in rows))
    problem = gh.BilevelProblem(gh.from_update(phi), bilevel_loss, bilevel_loss)
    found = {}
    for name, optimizer in optimizers().items():
        estimator = optimizer.estimator()
        step = gh.bilevel_step(estimator)
        batch = jax.tree.map(lambda x: jnp.zeros((1, BATCH, *x.shape[1:])), data)
        state = gh.init_state(problem, estimator, None, w, lam, batch)

        def ours(state, window, data, step=step):
            window = gh.Window(*map(take, data, window))
            return step(problem, state, window, RATE)

        hand = functools.partial(hand_step, name == "hyperdistill")
        carry = (w, lam, w, jnp.float32(0))
        found[f"w1/{name}/hand/flops"] = flops(
            compiled(hand, data, carry, 0.1, 1.0, gh.Window(*(r[0] for r in window)))
        )
        found[f"w1/{name}/ours/flops"] = flops(compiled(ours, state, window, data))
    return found


def report(name, args, episodes):
    data, rows, w, lam = make_problem(episodes)
    distill = name == "hyperdistill"
    scan, host = optimizers()[name], optimizers(loop="host")[name]
    resident = [gh.Resident(side, BATCH) for side in data]
    on_host = host_callables(data)
    batches = [[source() for source in on_host] for _ in range(episodes * T)]
    hand = jax.jit(functools.partial(hand_scan, distill))
    program = jax.jit(functools.partial(our_scan, scan))
    candidates = {
        "by hand, scan": lambda: hand(data, rows, w, lam),
        "run_episodes": lambda: program(data, rows, w, lam),
        "class, resident data": lambda: our_class(scan, resident, episodes, w, lam),
        "class, host callables": lambda: our_class(scan, on_host, episodes, w, lam),
        "by hand, Python loop": hand_loop(distill, data, rows, w, lam),
        "class, loop='host'": lambda: our_class(host, resident, episodes, w, lam),
        "own loop around step": our_step(scan, batches, w, lam),
    }
    candidates = {key: functools.partial(_done, run) for key, run in candidates.items()}
    first = {}
    for key, run in candidates.items():
        start = time.perf_counter()
        run()
        first[key] = time.perf_counter() - start
    seconds = race(candidates, 3 * args.rounds)
    each = {key: 1e6 * statistics.median(s) / (episodes * T) for key, s in seconds.items()}
    against = {
        "run_episodes": ("by hand, scan", SCAN_BAR),
        "class, resident data": ("by hand, scan", SCAN_BAR),
        "class, host callables": ("by hand, scan", None),
        "class, loop='host'": ("by hand, Python loop", LOOP_BAR),
        "own loop around step": ("by hand, Python loop", None),
    }
    table = [Row(key, "us per step", us) for key, us in each.items()]
    table += [Row(key, "first call, wall s", s) for key, s in first.items()]
    for key, (yardstick, bar) in against.items():
        table.append(Row(key, f"time / {yardstick}", ratio(seconds[key], seconds[yardstick]), bar))
    for found in peers.ask("gradhpo", "w1_gradhpo.py", name, 1 if args.small else 2):
        us = 1e6 * found["seconds_per_step"]
        table.append(Row("gradhpo 0.1.3, run", "us per step", us))
        table.append(Row("gradhpo 0.1.3, run", "time / run_episodes", us / each["run_episodes"]))
    show(f"W1 {name}, M = {episodes}, T = {T}, 517 hyperparameters", table)


def _done(run):
    return jax.block_until_ready(run())


def main():
    args = arguments(__doc__)
    warnings.simplefilter("ignore")
    print(machine())
    found = figures()
    rows = []
    for name in optimizers():
        value = found[f"w1/{name}/ours/flops"] / found[f"w1/{name}/hand/flops"]
        rows.append(Row(name, "flops of a step / by hand", value))
    show("W1, counts", rows)
    for name in optimizers():
        report(name, args, 2 if args.small else M)


if __name__ == "__main__":
    main()
