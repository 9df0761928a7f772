"""W7, exactly reversible training: memory and work of one hypergradient of a long run.

The network "params" of W2, one log learning rate per parameter and one log weight decay, SGD
with momentum 0.9 in the form of `reversible_sgd`; 1000 steps. The same hypergradient from a
stored trajectory, from segments, and by running training backwards, and from `jax.grad`
through the loop. Bits are per parameter; a stored trajectory of float32 takes 64 T of them,
weights and velocity.

    python benchmarks/w7_reversible.py --core 0
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from _common import MIB, Row, arguments, compiled, flops, machine, race, ratio, show, temp
from w2_reverse import judge, make_problem, train_loss, tree

import gradhpo as gh
from gradhpo.transforms import reversible_sgd

STEPS, MOMENTUM = 1000, 0.9
FLOPS_BAR = 1.6  # of the stored trajectory


def _optimizer(lam):
    return reversible_sgd(tree(jnp.exp, lam["rate"]), MOMENTUM)


PROBLEM = gh.BilevelProblem(gh.from_optax(train_loss, _optimizer), judge)


def by_jax_grad(w, lam, data):
    train, val = data

    def loss(lam):
        inner = PROBLEM.dynamics.init(w, lam)
        body = lambda inner, batch: (PROBLEM.dynamics.step(inner, lam, batch), None)  # noqa: E731
        return judge(jax.lax.scan(body, inner, train)[0].params, lam, val)

    return jax.value_and_grad(loss)(lam)


def ours(memory, w, lam, data):
    train, val = data
    inner = PROBLEM.dynamics.init(w, lam)
    window = gh.Window(train, tree(lambda x: x[None], val))
    got = gh.unrolled_gradients(PROBLEM, inner, lam, window, memory=memory)
    return got.val_loss, tree(jnp.add, got.direct, got.indirect)


METHODS = {
    "jax.grad": by_jax_grad,
    "trajectory": functools.partial(ours, "trajectory"),
    "segments": functools.partial(ours, "segments"),
    "reversible": functools.partial(ours, "reversible"),
}


def shapes(steps):
    """The problem of W2 with another number of steps, as shapes: nothing is run."""
    w, lam, (train, val) = make_problem("params", shapes_only=True)
    train = tree(lambda x: jax.ShapeDtypeStruct((steps, *x.shape[1:]), x.dtype), train)
    return w, lam, (train, val)


def bits(steps=STEPS):
    """`(allocated, spare among them)` bits per parameter of the information buffer."""
    from gradhpo.utils.exact_arithmetic import PLANE, allocated_bits, empty_buffer, worst_bits

    buffer = empty_buffer((), worst_bits(np.full(steps, MOMENTUM)))
    return allocated_bits(buffer), PLANE


def figures(small=False):
    steps = 20 if small else STEPS
    found = {}
    for name, method in METHODS.items():
        program = compiled(method, *shapes(steps))
        found[f"w7/{name}/flops"] = flops(program)
        found[f"w7/{name}/temp"] = temp(program)
    found["w7/reversible/bits"] = bits(steps)[0]
    return found


def report(args):
    steps = 20 if args.small else STEPS
    counted = {name: compiled(method, *shapes(steps)) for name, method in METHODS.items()}
    stored = temp(counted["trajectory"])
    rows = []
    for name, program in counted.items():
        rows.append(Row(name, "temp MiB", temp(program) / MIB))
        rows.append(Row(name, "temp / trajectory", temp(program) / stored))
        bar = FLOPS_BAR if name == "reversible" else None
        rows.append(
            Row(name, "flops / trajectory", flops(program) / flops(counted["trajectory"]), bar)
        )
    allocated, spare = bits(steps)
    floor = steps * math.log2(1 / MOMENTUM)
    rows += [
        Row("buffer", "bits per parameter, no spare", allocated - spare, 1.15 * floor + 37.3),
        Row("buffer", "spare bits", spare),
        Row("buffer", "T log2(1 / momentum)", floor),
        Row("buffer", "64 T / bits", 64 * steps / allocated),
    ]
    show(f"W7 counts, T = {steps}, momentum {MOMENTUM}", rows)

    problem = make_problem("params", args.small)  # the 100 steps of W2
    programs = {name: compiled(method, *problem) for name, method in METHODS.items()}
    runs = {
        name: functools.partial(lambda run: jax.block_until_ready(run(*problem)), program)
        for name, program in programs.items()
    }
    seconds = race(runs, args.rounds)
    rows = [
        Row(name, f"time / {base}", ratio(seconds[name], seconds[base]))
        for name in METHODS
        for base in ("jax.grad", "trajectory")
        if name != base
    ]
    show("W7 time, T = 100", rows)


def main():
    args = arguments(__doc__)
    print(machine())
    report(args)


if __name__ == "__main__":
    main()
