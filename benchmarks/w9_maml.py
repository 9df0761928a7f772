"""W9, MAML on sinusoids: a meta-step of the class beside the same step by hand.

The example `gradhpo.examples.maml`: network 1-40-40-1, 25 tasks of ten points and ten more, one
inner step, Adam. By hand it is `jax.grad` of the loss after the inner step, mapped over the tasks:
"by hand" is one compiled call a meta-step, "by hand, scan" all of them in one, which is what the
class comes near to with several episodes a call. All draw the same tasks, from keys, inside; that
their hypergradients agree is a test, `tests/estimators/test_over_tasks.py`.

    python benchmarks/w9_maml.py --core 0
"""

import functools
import statistics

import jax
import optax
from _common import Row, arguments, compiled, flops, machine, race, ratio, show, temp

import gradhpo as gh
from gradhpo.examples.maml import META_RATE, OPTIMIZER, RATE, TASKS, begin, init, loss

STEPS = 2000
BAR = 1.15
ADAM = optax.adam(META_RATE)


def meta_loss(weights, key):
    (train, val) = begin(None, weights, key).window
    train, val = (jax.tree.map(lambda x: x[0], side) for side in (train, val))
    after = jax.tree.map(lambda w, g: w - RATE * g, weights, jax.grad(loss)(weights, None, train))
    return loss(after, None, val)


def meta_step(carry, episode):
    weights, slots = carry
    key = jax.random.fold_in(jax.random.key(0), episode)
    keys = jax.random.split(key, TASKS)
    mean = lambda weights: jax.vmap(lambda key: meta_loss(weights, key))(keys).mean()  # noqa: E731
    updates, slots = ADAM.update(jax.grad(mean)(weights), slots)
    return optax.apply_updates(weights, updates), slots


def fresh():
    weights = init(0)
    return weights, ADAM.init(weights)


@functools.cache
def hand_step():
    return jax.jit(meta_step, donate_argnums=0)


def by_hand(steps):
    carry = jax.tree.map(lambda x: x + 0, fresh())
    for episode in range(steps):
        carry = hand_step()(carry, episode)
    return carry[0]


@functools.cache
def hand_scan(steps):
    body = lambda carry, m: (meta_step(carry, m), None)  # noqa: E731
    return jax.jit(lambda carry: jax.lax.scan(body, carry, jax.numpy.arange(steps))[0][0])


def ours(steps):
    state = OPTIMIZER.init(init(0), init(0))
    return OPTIMIZER.run(state, steps, train_loss_fn=loss, val_loss_fn=loss).hyperparams


def figures():
    """Flops of one meta-step."""
    found = {}
    weights, outer = init(0), OPTIMIZER.outer_optimizer
    step = compiled(meta_step, fresh(), 0)
    problem = gh.BilevelProblem(gh.from_optax(loss, optax.sgd(RATE)), loss, loss, begin)
    method = gh.over_tasks(gh.reverse(1), TASKS)
    state = gh.init_state(problem, method, outer, weights, weights)
    run = functools.partial(gh.run_episode, method, outer, problem)
    episode = compiled(lambda state: run(state, None), state)
    for name, program in (("by hand", step), ("ours", episode)):
        found[f"w9/{name}/flops"] = flops(program)
        found[f"w9/{name}/temp"] = temp(program)
    return found


def main():
    args = arguments(__doc__)
    print(machine())
    steps = 20 if args.small else STEPS
    candidates = {
        "by hand": functools.partial(by_hand, steps),
        "by hand, scan": lambda: hand_scan(steps)(fresh()),
        "ours": functools.partial(ours, steps),
    }
    runs = {
        name: functools.partial(lambda run: jax.block_until_ready(run()), run)
        for name, run in candidates.items()
    }
    seconds = race(runs, args.rounds)
    rows = [
        Row(name, "ms per meta-step", 1e3 * statistics.median(each) / steps)
        for name, each in seconds.items()
    ]
    for name in ("by hand", "by hand, scan"):
        bar = BAR if name == "by hand" else None
        rows.append(Row("ours", f"time / {name}", ratio(seconds["ours"], seconds[name]), bar))
    show(f"W9, {steps} meta-steps", rows)
    print(machine())


if __name__ == "__main__":
    main()
