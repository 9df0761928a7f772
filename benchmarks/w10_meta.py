"""W10, HyperDistill over meta-batches: an episode of the loop beside the same written by hand.

Sinusoids as in Lee et al. (2022), appendix G: network 1-100-100-100-1, its first three layers the
hyperparameters, ten tasks, T = 30 steps of SGD with momentum on ten points, fresh points to
validate at every step, Adam, Reptile for the head. By hand it is one `scan` over the steps, whose
second-order product is one derivative of the training gradient along alpha.

    python benchmarks/w10_meta.py --core 0
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import optax
from _common import Row, arguments, compiled, flops, machine, race, ratio, show, temp

import gradhpo as gh
from gradhpo.meta import Sinusoids, carried

TASKS, T, GAMMA, RATE, MOMENTUM, THETA = 10, 30, 0.99, 0.01, 0.9, 0.6
WIDTHS = (1, 100, 100, 100)
ADAM = optax.adam(1e-3)
SAMPLE = Sinusoids(steps=T)
BAR = 1.2


def init(key):
    keys = jax.random.split(key, len(WIDTHS))
    body = [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=False)
    ]
    return {"w": jax.random.normal(keys[-1], (WIDTHS[-1],)) / 10, "b": jnp.zeros(())}, body


def loss(head, body, batch):
    x, y = batch
    h = x[:, None]
    for layer in body:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    return jnp.mean((h @ head["w"] + head["b"] - y) ** 2)


def hand_task(body, carry, batches):
    """One step of one task: `(h, carry)`."""
    head, velocity, average, kept, weight, key = carry
    train, val = batches
    weight = GAMMA * weight + 1
    average = jax.tree.map(lambda a, w: a + (w - a) / weight, average, head)
    key, draw = jax.random.split(key)
    old = jax.random.bernoulli(draw, 1 - 1 / weight, train[0].shape)
    kept = jax.tree.map(lambda a, b: jnp.where(old, a, b), kept, train)
    g = jax.grad(loss)(head, body, train)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, g)
    head = jax.tree.map(lambda w, v: w - RATE * v, head, velocity)
    alpha, direct = jax.grad(loss, argnums=(0, 1))(head, body, val)
    q = jax.tree.map(lambda a: -RATE * THETA * weight * a, alpha)
    along = lambda head: jax.grad(loss, argnums=1)(head, body, kept)  # noqa: E731
    second = jax.jvp(along, (average,), (q,))[1]
    return optax.tree.add(direct, second), (head, velocity, average, kept, weight, key)


def hand_episode(carry, episode):
    head, body, slots = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), episode), TASKS)
    window = jax.vmap(SAMPLE, out_axes=1)(keys)
    heads = jax.tree.map(lambda x: jnp.broadcast_to(x, (TASKS, *x.shape)), head)
    zeros = jax.tree.map(jnp.zeros_like, heads)
    first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), window.train)
    tasks = (heads, zeros, zeros, first, jnp.zeros(TASKS), keys)

    def step(carry, batches):
        body, slots, tasks = carry
        h, tasks = jax.vmap(lambda t, b: hand_task(body, t, b))(tasks, batches)
        h = jax.tree.map(lambda x: x.mean(axis=0), h)
        updates, slots = ADAM.update(h, slots)
        return (optax.apply_updates(body, updates), slots, tasks), None

    (body, slots, tasks), _ = jax.lax.scan(step, (body, slots, tasks), tuple(window))
    return jax.tree.map(lambda x: x.mean(axis=0), tasks[0]), body, slots


def our_method():
    return gh.over_tasks(gh.hyperdistill(GAMMA, theta=THETA), TASKS)


def problem():
    train = gh.from_optax(loss, optax.sgd(RATE, MOMENTUM))
    return gh.BilevelProblem(train, loss, begin=carried(SAMPLE))


def ready(method, task):
    head, body = init(jax.random.key(1))
    window = jax.eval_shape(lambda key: SAMPLE(key), jax.random.key(0))
    both = jax.tree.map(lambda x: jnp.zeros((T, TASKS, *x.shape[1:])), window)
    return gh.init_state(task, method, ADAM, head, body, both)


@functools.cache
def hand_run(episodes):
    body = lambda carry, m: (hand_episode(carry, m), None)  # noqa: E731
    return jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(episodes))[0])


@functools.cache
def our_run(episodes):
    run = functools.partial(gh.run_episodes, our_method(), ADAM, problem())
    return jax.jit(lambda state: run(state, None, episodes=episodes)[0].hyperparams)


def start():
    head, body = init(jax.random.key(1))
    return head, body, ADAM.init(body)


def figures():
    """Flops of one episode (the body of a loop is counted once)."""
    method, task = our_method(), problem()
    episode = functools.partial(gh.run_episode, method, ADAM, task)
    found = {}
    for name, program in (
        ("by hand", compiled(hand_episode, start(), 0)),
        ("ours", compiled(lambda state: episode(state, None), ready(method, task))),
    ):
        found[f"w10/{name}/flops"] = flops(program)
        found[f"w10/{name}/temp"] = temp(program)
    return found


def main():
    args = arguments(__doc__)
    print(machine())
    episodes = 2 if args.small else 100
    state = ready(our_method(), problem())
    runs = {
        "by hand": lambda: jax.block_until_ready(hand_run(episodes)(start())),
        "ours": lambda: jax.block_until_ready(our_run(episodes)(state)),
    }
    seconds = race(runs, args.rounds)
    rows = [
        Row(name, "ms per update", 1e3 * statistics.median(each) / (episodes * T))
        for name, each in seconds.items()
    ]
    rows.append(Row("ours", "time / by hand", ratio(seconds["ours"], seconds["by hand"]), BAR))
    rows.append(Row("ours", "programs", our_run(episodes)._cache_size(), 1))
    show(f"W10, {episodes} episodes of {TASKS} tasks and {T} steps", rows)
    print(machine())


if __name__ == "__main__":
    main()
