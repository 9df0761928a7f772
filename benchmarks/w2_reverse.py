"""W2, reverse mode through 100 steps of SGD with momentum, against `jax.grad` and by hand.

One log learning rate per parameter and one log weight decay. Two networks: "params"
(784-256-256-10, batch 128) has more parameters than activations, "acts" (64-[64]x8-10, batch
1024) more activations than parameters. Bars are relative to `jax.grad` through the scan; the
lower bound is the adjoint recursion by hand, which stores one velocity per step.

    python benchmarks/w2_reverse.py --core 0
"""

import functools
import statistics

import _problems
import jax
import jax.numpy as jnp
import numpy as np
import peers
from _common import MIB, Row, arguments, compiled, flops, machine, race, ratio, show, temp

import gradhpo as gh
from gradhpo.transforms.retraceable import momentum_sgd

NETS = ("params", "acts")
MOMENTUM = 0.9
BARS = {  # of jax.grad: temporary bytes, processor seconds
    "params": {"trajectory": (0.45, 1.05), "opaque": (0.85, None), "segments": (0.2, 1.2)},
    "acts": {"trajectory": (0.05, 0.75), "opaque": (None, None), "segments": (None, None)},
}


def make_problem(net, small=False, shapes_only=False):
    """`(weights, hyperparameters, window)`; the window's last validation batch counts."""
    if shapes_only:
        sizes, batch, judges, steps = _problems.w2_sizes(net, small)
        shape = jax.ShapeDtypeStruct
        w = [
            (shape((a, b), jnp.float32), shape((b,), jnp.float32))
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]

        def side(*lead):
            return shape((*lead, sizes[0]), jnp.float32), shape(lead, jnp.int32)

        return w, {"rate": w, "decay": shape((), jnp.float32)}, (side(steps, batch), side(judges))
    w, train, val = jax.tree.map(jnp.asarray, _problems.w2(net, small))
    rate = jax.tree.map(lambda x: jnp.full_like(x, np.log(0.01)), w)
    return w, {"rate": rate, "decay": jnp.float32(np.log(1e-3))}, (train, val)


def cross_entropy(w, batch):
    x, y = batch
    for a, b in w[:-1]:
        x = jax.nn.relu(x @ a + b)
    a, b = w[-1]
    scores = jax.nn.log_softmax(x @ a + b)
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], 1))


def judge(w, lam, batch):
    del lam
    return cross_entropy(w, batch)


def train_loss(w, lam, batch):
    squares = sum(jnp.vdot(x, x) for x in jax.tree.leaves(w))
    return cross_entropy(w, batch) + 0.5 * jnp.exp(lam["decay"]) * squares


def tree(function, *trees):
    return jax.tree.map(function, *trees)


# -- jax.grad and by hand ----------------------------------------------------------------


def sgd(state, lam, batch):
    """`m' = 0.9 m + g + decay w` and `w' = w - rate m'`."""
    w, m = state
    g = jax.grad(cross_entropy)(w, batch)
    decay = jnp.exp(lam["decay"])
    m = tree(lambda m, g, w: MOMENTUM * m + g + decay * w, m, g, w)
    return tree(lambda w, r, m: w - jnp.exp(r) * m, w, lam["rate"], m), m


def training(w, lam, data):
    """The loss after training, nothing differentiated: what a training run costs."""
    start = (w, tree(jnp.zeros_like, w))
    (w, _), _ = jax.lax.scan(lambda s, batch: (sgd(s, lam, batch), None), start, data[0])
    return cross_entropy(w, data[1])


def by_jax_grad(w, lam, data):
    return jax.value_and_grad(lambda lam: training(w, lam, data))(lam)


def by_hand(w, lam, data):
    """The adjoint recursion: stores m_t, takes w_{t-1} = w_t + rate m_t back."""
    train, val = data
    rate, decay = tree(jnp.exp, lam["rate"]), jnp.exp(lam["decay"])

    def forward(state, batch):
        w, m = state
        g = jax.grad(cross_entropy)(w, batch)
        m = tree(lambda m, g, w: MOMENTUM * m + g + decay * w, m, g, w)
        return (tree(lambda w, r, m: w - r * m, w, rate, m), m), m

    def backward(carry, x):
        w, a, b, h_rate, h_decay = carry  # a = dL/dw_t, b = dL/dm_t from later steps
        m, batch = x
        w = tree(lambda w, r, m: w + r * m, w, rate, m)
        h_rate = tree(lambda h, a, m: h - a * m, h_rate, a, m)  # times the rate, at the end
        q = tree(lambda b, r, a: b - r * a, b, rate, a)
        h_decay += sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (w, q)), strict=True))
        _, hq = jax.jvp(lambda w: jax.grad(cross_entropy)(w, batch), (w,), (q,))
        a = tree(lambda a, h, q: a + h + decay * q, a, hq, q)
        return (w, a, tree(lambda q: MOMENTUM * q, q), h_rate, h_decay), None

    zeros = tree(jnp.zeros_like, w)
    (w, _), velocities = jax.lax.scan(forward, (w, zeros), train)
    value, a = jax.value_and_grad(cross_entropy)(w, val)
    carry = (w, a, zeros, zeros, jnp.zeros(()))
    carry, _ = jax.lax.scan(backward, carry, (velocities, train), reverse=True)
    *_, h_rate, h_decay = carry
    return value, {"rate": tree(jnp.multiply, h_rate, rate), "decay": h_decay * decay}


# -- ours ----------------------------------------------------------------


def _optax(lam):
    return momentum_sgd(tree(jnp.exp, lam["rate"]), MOMENTUM)


def _opaque_judge(state, lam, batch):
    return judge(state[0], lam, batch)


KNOWN = gh.BilevelProblem(gh.from_optax(train_loss, _optax), judge)
OPAQUE = gh.BilevelProblem(gh.from_update(sgd), _opaque_judge)


def ours(problem, memory, w, lam, data):
    train, val = data
    params = w if problem is KNOWN else (w, tree(jnp.zeros_like, w))
    inner = problem.dynamics.init(params, lam)
    window = gh.Window(train, tree(lambda x: x[None], val))
    got = gh.unrolled_gradients(problem, inner, lam, window, memory=memory)
    return got.val_loss, tree(jnp.add, got.direct, got.indirect)


METHODS = {
    "jax.grad": by_jax_grad,
    "by hand": by_hand,
    "trajectory": functools.partial(ours, KNOWN, "trajectory"),
    "opaque": functools.partial(ours, OPAQUE, "trajectory"),
    "segments": functools.partial(ours, KNOWN, "segments"),
}


def figures(nets=NETS, small=False):
    found = {}
    for net in nets:
        args = make_problem(net, small, shapes_only=True)
        for name, method in METHODS.items():
            program = compiled(method, *args)
            found[f"w2/{net}/{name}/flops"] = flops(program)
            found[f"w2/{net}/{name}/temp"] = temp(program)
    return found


# -- measuring ----------------------------------------------------------------


def report(net, args):
    problem = make_problem(net, args.small)
    programs = {name: compiled(f, *problem) for name, f in METHODS.items()}
    candidates = {"training only": compiled(training, *problem), **programs}
    candidates = {
        name: functools.partial(lambda run: jax.block_until_ready(run(*problem)), run)
        for name, run in candidates.items()
    }
    seconds = race(candidates, args.rounds)
    rows = []
    for name, program in programs.items():
        space, pace = BARS[net].get(name, (None, None))
        rows.append(Row(name, "temp MiB", temp(program) / MIB))
        if name != "jax.grad":
            rows.append(
                Row(name, "temp / jax.grad", temp(program) / temp(programs["jax.grad"]), space)
            )
            paced = ratio(seconds[name], seconds["jax.grad"])
            rows.append(Row(name, "time / jax.grad", paced, pace))
            rows.append(Row(name, "difference from jax.grad", _difference(candidates, name)))
        if name not in ("jax.grad", "by hand"):
            rows.append(Row(name, "time / by hand", ratio(seconds[name], seconds["by hand"])))
    for name in ("jax.grad", "by hand", "trajectory"):
        paced = ratio(seconds[name], seconds["training only"])
        rows.append(Row(name, "time / training only", paced))
    yardstick = statistics.median(seconds["trajectory"])
    small = ["--small"] if args.small else []
    for method in ("training", "torchopt", "higher"):
        for found in peers.ask("torch", "w2_torch.py", method, net, min(args.rounds, 3), *small):
            name, peer = f"{method} (torch)", statistics.median(found["seconds"])
            rows.append(Row(name, "time / trajectory", peer / yardstick))
            rows.append(Row(name, "growth of its peak memory, MiB", found["mib"]))
            if method == "training":
                torch_training = peer
            else:
                rows.append(Row(name, "time / its own training", peer / torch_training))
    show(f"W2 {net}, T = {problem[2][0][1].shape[0]}", rows)


def _difference(candidates, name):
    """Relative, in the norm of the whole hypergradient."""
    got, want = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(candidates[key]()[1])])
        for key in (name, "jax.grad")
    )
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main():
    args = arguments(__doc__)
    print(machine())
    for net in NETS:
        report(net, args)


if __name__ == "__main__":
    main()
