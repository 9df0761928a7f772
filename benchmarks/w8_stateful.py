"""W8, losses with model state: BatchNorm, Dropout and AdamW, beside the same steps by hand.

"cnn": 28x28 images, two convolutions with BatchNorm, Dropout, batch 100. "transformer": two
layers of width 64, 4 heads, 32 tokens, batch 32. Hyperparameters: a log rate per layer, log
weight decay, label smoothing, input noise. An episode has ten training steps; "one_step" takes
an outer step of Adam after each, "reverse" one at the end. "opaque" is the same training as an
`update_fn`, with slots, statistics and keys packed into `params`.

    python benchmarks/w8_stateful.py --core 0
"""

import functools
import statistics
import time

import jax
import numpy as np
import optax
from _common import Row, arguments, compiled, flops, machine, race, ratio, show, temp
from _models import MODELS, adamw
from _w8_hand import OUTER, begin_run, fetched, one_step, plain_step, runs

import gradhpo as gh

STEPS = 10
LOOPS = {"cnn": "host", "transformer": "scan"}  # by hand; on CPU not a convolution in a scan
METHODS = ("one_step", "reverse")
TIME_BAR, COMPILE_BAR = 1.1, 1.5


def make_rows(model, steps=STEPS):
    """The examples of every batch of both sides, `(steps, batch)`."""
    rng = np.random.default_rng(1)
    sides = (model.train, model.val)
    return tuple(rng.integers(0, len(y), (steps, model.batch), np.int32) for _, y in sides)


# -- ours ----------------------------------------------------------------


def opaque_step(model, p, lam, batch):
    """A training step as an `update_fn`: what changes is one tree."""
    slope = jax.grad(model.train_loss, has_aux=True)
    g, (state, _) = slope(p["w"], lam, batch, p["state"])
    updates, slots = adamw(lam).update(g, p["slots"], p["w"])
    w = optax.apply_updates(p["w"], updates)
    return {"w": w, "slots": slots, "state": jax.lax.stop_gradient(state)}


def opaque_losses(model):
    def train_loss(p, lam, batch):
        return model.train_loss(p["w"], lam, batch, p["state"])[0]

    def val_loss(p, lam, batch):
        return model.val_loss(p["w"], lam, batch, p["state"])[0]

    return train_loss, val_loss


def problem_of(model, opaque=False):
    """`(problem, the state before training)`."""
    lam = model.hyperparams
    if not opaque:
        dynamics = gh.from_optax(model.train_loss, adamw)
        problem = gh.BilevelProblem(dynamics, model.val_loss, model.train_loss)
        return problem, dynamics.init(model.params, lam)._replace(model_state=model.model_state)
    dynamics = gh.from_update(functools.partial(opaque_step, model))
    train_loss, val_loss = opaque_losses(model)
    packed = {"w": model.params, "state": model.model_state}
    packed["slots"] = adamw(lam).init(model.params)
    return gh.BilevelProblem(dynamics, val_loss, train_loss), dynamics.init(packed, lam)


def our_run(method, model, opaque=False):
    """One episode of the class on resident data."""
    make = {"one_step": gh.OneStepOptimizer, "reverse": gh.ReverseOptimizer}[method]
    settings = {"T": STEPS, "outer_optimizer": OUTER}
    if opaque:
        train_loss, val_loss = opaque_losses(model)
        optimizer = make(update_fn=functools.partial(opaque_step, model), **settings)
        state = optimizer.init(problem_of(model, opaque)[1].params, model.hyperparams)
    else:
        train_loss, val_loss = model.train_loss, model.val_loss
        optimizer = make(inner_optimizer=adamw, **settings)
        state = optimizer.init(model.params, model.hyperparams, model_state=model.model_state)
    return functools.partial(
        optimizer.run,
        state,
        1,
        get_train_batch=gh.Resident(model.train, model.batch),
        get_val_batch=gh.Resident(model.val, model.batch),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )


def hand_run(method, name, model):
    return functools.partial(runs(model, LOOPS[name])[method], begin_run(model), make_rows(model))


# -- counts ----------------------------------------------------------------


def our_step(problem, inner, lam, window):
    """One outer step of the functional form."""
    estimator = gh.one_step()
    step = gh.bilevel_step(estimator, OUTER)
    state = gh.init_state(
        problem, estimator, OUTER, inner.params, lam, window, model_state=inner.model_state
    )
    return functools.partial(step, problem), (state, window)


def figures():
    """Flops of one training step with and without an outer step."""
    found = {}
    for name, make in MODELS.items():
        model = make()
        carry, rows = begin_run(model), make_rows(model, 1)
        train, val = (fetched(d, r[0]) for d, r in zip((model.train, model.val), rows, strict=True))
        found[f"w8/{name}/plain/flops"] = flops(
            compiled(functools.partial(plain_step, model), carry[0], carry[1], train)
        )
        by_hand = compiled(functools.partial(one_step, model), carry, train, val)
        found[f"w8/{name}/one_step, by hand/flops"] = flops(by_hand)
        found[f"w8/{name}/one_step, by hand/temp"] = temp(by_hand)
        window = gh.Window(*(jax.tree.map(lambda x: x[None], side) for side in (train, val)))
        for opaque in (False, True):
            problem, inner = problem_of(model, opaque)
            step, args = our_step(problem, inner, model.hyperparams, window)
            label = "one_step, opaque" if opaque else "one_step"
            program = compiled(step, *args)
            found[f"w8/{name}/{label}/flops"] = flops(program)
            found[f"w8/{name}/{label}/temp"] = temp(program)
    return found


# -- measuring ----------------------------------------------------------------


def report(name, rounds, small):
    model = MODELS[name](small=small)
    candidates = {"plain": hand_run("plain", name, model)}
    for method in METHODS:
        candidates[f"{method}, by hand"] = hand_run(method, name, model)
        candidates[method] = our_run(method, model)
        candidates[f"{method}, opaque"] = our_run(method, model, opaque=True)
    candidates = {key: functools.partial(_done, run) for key, run in candidates.items()}
    first = {key: _first(run) for key, run in candidates.items()}
    seconds = race(candidates, rounds)
    table = []
    for key, each in seconds.items():
        table.append(Row(key, "ms per training step", 1e3 * statistics.median(each) / STEPS))
        table.append(Row(key, "first call, processor s", first[key]))
        if key != "plain":
            table.append(Row(key, "time / plain", ratio(each, seconds["plain"])))
    for method in METHODS:
        hand, met = f"{method}, by hand", (TIME_BAR, COMPILE_BAR)
        compared = {method: met, f"{method}, opaque": (None, None)}
        for key, bars in compared.items():
            table.append(Row(key, "time / by hand", ratio(seconds[key], seconds[hand]), bars[0]))
            table.append(Row(key, "first call / by hand", first[key] / first[hand], bars[1]))
    show(f"W8 {name}, T = {STEPS}", table)


def _done(run):
    return jax.block_until_ready(run())


def _first(run):
    """Processor seconds of tracing, compiling and one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main():
    args = arguments(__doc__)
    print(machine())
    for name in MODELS:
        report(name, 1 if args.small else args.rounds, args.small)
    print(machine())


if __name__ == "__main__":
    main()
