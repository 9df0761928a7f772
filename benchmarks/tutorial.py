"""The tutorial's problem: ours against hand-written JAX, in one process, taking turns.

MLP 10-32-5, one learning rate per parameter (517), T = 20, M = 60, batch 128. Three ways
to run it: one compiled program (`run_episodes`), the class with resident data, the class
with host callables. The yardstick is the same arithmetic written out by hand in one
`lax.scan`, without guard, status or metrics.

    python benchmarks/tutorial.py            processor seconds; pin it: taskset -c 0
"""

import functools
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import gradhpo as gh

M, T, BATCH, GAMMA, RATE, PERIOD = 60, 20, 128, 0.99, 3e-3, 10
REPETITIONS = 15


def make_problem():
    """Data, index arrays, initial weights and log learning rates, all from one seed."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((5, 10))

    def sample(n, noise):
        y = rng.integers(0, 5, n)
        x = centres[y] + 0.5 * rng.standard_normal((n, 10))
        y = np.where(rng.random(n) < noise, rng.integers(0, 5, n), y)
        return jnp.asarray(x, jnp.float32), jnp.eye(5)[y]

    data = gh.Window(sample(500, 0.2), sample(200, 0.0))
    rows = gh.Window(*(rng.integers(0, n, (M, T, BATCH), dtype=np.int32) for n in (500, 200)))
    sizes = {"w1": (10, 32), "b1": (32,), "w2": (32, 5), "b2": (5,)}
    w = {
        k: jnp.asarray(rng.standard_normal(s) * np.sqrt(2 / s[0]) * (len(s) == 2), jnp.float32)
        for k, s in sizes.items()
    }
    lam = jax.tree.map(lambda x: jnp.full_like(x, np.log(np.expm1(0.05))), w)
    return data, rows, w, lam


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


def lerp(a, b, t):
    return jax.tree.map(lambda a, b: (1 - t) * a + t * b, a, b)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def by_hand(distill, data, rows, w, lam):
    """One-step, or HyperDistill with D* = D_t, as one would write it for this problem alone."""

    def take(side, i):
        return jax.tree.map(lambda x: x[i], side)

    def fit(w0, lam, train, val):
        w_end, _ = jax.lax.scan(lambda w, i: (phi(w, lam, take(data.train, i)), None), w0, train)
        alpha_end = jax.grad(loss)(w_end, take(data.val, val))

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

    def episode(carry, x):
        w, lam, theta = carry
        m, rows = x
        rate = RATE * (1 - m / M)
        if distill:
            theta = jax.lax.cond(
                m % PERIOD == 0,
                lambda: fit(w, lam, rows.train, rows.val[-1]),
                lambda: theta,
            )

        def step(carry, i):
            w, lam, w_star, weight = carry
            batch = take(data.train, i.train)
            weight = GAMMA * weight + 1
            w_star = lerp(w_star, w, 1 / weight) if distill else w
            new = phi(w, lam, batch)
            alpha = jax.grad(loss)(new, take(data.val, i.val))
            (h,) = jax.vjp(lambda lam: phi(w_star, lam, batch), lam)[1](alpha)
            scale = rate * theta * weight if distill else rate
            return (new, jax.tree.map(lambda x, h: x - scale * h, lam, h), w_star, weight), None

        (w, lam, *_), _ = jax.lax.scan(step, (w, lam, w, 0.0), rows)
        return (w, lam, theta), loss(w, data.val)

    xs = (jnp.arange(M), rows)
    return jax.lax.scan(episode, (w, lam, jnp.float32(1)), xs)


def ours(optimizer, data, rows, w, lam):
    """The same run as one program of the library."""
    problem = gh.BilevelProblem(gh.from_update(phi), bilevel_loss, bilevel_loss)
    estimator = optimizer.estimator()
    state = gh.init_state(problem, estimator, None, w, lam, gh.Window(data.train, data.val))
    state = state.update(memory=_fit_batch(state.memory, data))
    return gh.run_episodes(
        estimator,
        None,
        problem,
        state,
        rows,
        gh.linear_decay(RATE, M),
        estimation_period=PERIOD,
        resident=data,
        observe=lambda state: loss(state.params, data.val),
    )


def _fit_batch(memory, data):
    if not hasattr(memory, "data"):
        return memory
    batch = jax.tree.map(lambda x: jnp.zeros((BATCH, *x.shape[1:])), data.train)
    return memory._replace(data=batch)


def with_class(optimizer, sources, w, lam):
    return optimizer.run(
        optimizer.init(w, lam),
        M,
        get_train_batch=sources[0],
        get_val_batch=sources[1],
        train_loss_fn=bilevel_loss,
        val_loss_fn=bilevel_loss,
        lr_hyper=RATE,
    )


def host_callables(data):
    rng = np.random.default_rng(0)
    sides = [jax.tree.map(np.asarray, side) for side in data]

    def source(side):
        rows = rng.integers(0, len(side[1]), BATCH)
        return side[0][rows], side[1][rows]

    return [functools.partial(source, side) for side in sides]


def main():
    warnings.simplefilter("ignore")
    args = make_problem()
    print(f"M = {M}, T = {T}, 517 hyperparameters, float32; processor time, medians")
    report("one_step", gh.OneStepOptimizer(update_fn=phi, T=T), *args)
    distill = gh.OnlineHypergradientOptimizer(
        update_fn=phi, T=T, gamma=GAMMA, estimation_period=PERIOD
    )
    report("hyperdistill", distill, *args)


def report(name, optimizer, *args):
    """Run the candidates in turn and print microseconds per step and ratios within a turn."""
    data, _, w, lam = args
    hand = jax.jit(functools.partial(by_hand, name == "hyperdistill"))
    program = jax.jit(functools.partial(ours, optimizer))
    resident = [gh.Resident(side, BATCH) for side in data]
    on_host = host_callables(data)
    candidates = {
        "by hand, one program": lambda: hand(*args),
        "run_episodes, one program": lambda: program(*args),
        "class, resident data": lambda: with_class(optimizer, resident, w, lam),
        "class, host callables": lambda: with_class(optimizer, on_host, w, lam),
    }
    seconds, first = {key: [] for key in candidates}, {}
    for key, run in candidates.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        first[key] = time.perf_counter() - start
    for _ in range(REPETITIONS):
        for key, run in candidates.items():
            start = time.process_time()
            jax.block_until_ready(run())
            seconds[key].append(time.process_time() - start)
    print(f"\n{name:28s} us/step  x by hand  first call, wall s")
    yardstick = seconds["by hand, one program"]
    for key, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, yardstick, strict=True))
        each = 1e6 * statistics.median(values) / (M * T)
        print(f"  {key:26s} {each:7.1f} {ratio:10.2f} {first[key]:10.1f}")


if __name__ == "__main__":
    main()
