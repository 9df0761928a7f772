"""W11, constrained and sparse outer updates at ten million hyperparameters.

Each is a projection, a proximal step or a choice of few, beside one gradient of a perceptron with
as many weights, on a small and on a large batch. The counts are of a million.

    python benchmarks/w11_outer.py --core 0
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import optax
from _common import Row, arguments, compiled, flops, machine, race, ratio, show, temp

from gradhpo import spaces, transforms
from gradhpo.outer import descent

H, COUNTED, SMALL = 10**7, 10**6, 10**4
BATCHES, ROWS = (128, 1024), 10
BAR = 0.5


def updates():
    """Name -> function of an array of H numbers."""

    def chosen(x):
        outer = transforms.top_k(descent(0.1), 0.1)
        return outer.apply(x, outer.init(x), x)[0]

    one = jnp.ones(())
    return {
        "top_k, a tenth": chosen,
        "budget": lambda x: spaces.budget(x, 0.01 * x.size),
        "simplex": spaces.simplex_rows,
        "simplex, rows of 10": lambda x: spaces.simplex_rows(x.reshape(-1, ROWS)),
        "box": optax.projections.projection_hypercube,
        "l1": lambda x: transforms.l1(0.1).prox(x, one),
        "group lasso, rows of 10": lambda x: transforms.group_lasso(0.1).prox(
            x.reshape(-1, ROWS), one
        ),
    }


def weights(H):
    """A perceptron of about H weights: three square layers."""
    n = round((H / 3) ** 0.5)
    return [jnp.full((n, n), 1 / n) for _ in range(3)]


@jax.grad
def gradient(w, batch):
    x = batch
    for layer in w:
        x = jax.nn.relu(x @ layer)
    return jnp.mean(x**2)


def figures():
    """Flops and temporary bytes; of loops the body counts once."""
    x, found = jax.ShapeDtypeStruct((COUNTED,), jnp.float32), {}
    for name, function in updates().items():
        program = compiled(function, x)
        found[f"w11/{name}/flops"] = flops(program)
        if needed := temp(program):
            found[f"w11/{name}/temp"] = needed
    return found


def main():
    args = arguments(__doc__)
    print(machine())
    size = SMALL if args.small else H
    w, key = weights(size), jax.random.key(0)
    candidates = {}
    for n in BATCHES:
        batch = jax.random.normal(key, (n, len(w[0])))
        candidates[f"gradient, batch {n}"] = functools.partial(
            compiled(gradient, w, batch), w, batch
        )
    x = jax.random.normal(key, (size,))
    candidates |= {
        name: functools.partial(compiled(function, x), x) for name, function in updates().items()
    }
    runs = {
        name: functools.partial(lambda run: jax.block_until_ready(run()), run)
        for name, run in candidates.items()
    }
    seconds = race(runs, args.rounds)
    rows = [Row(name, "ms", 1e3 * statistics.median(each)) for name, each in seconds.items()]
    rows += [
        Row(
            name,
            f"time / gradient, batch {n}",
            ratio(seconds[name], seconds[f"gradient, batch {n}"]),
            BAR,
        )
        for n in BATCHES
        for name in updates()
    ]
    show(f"W11, {size:,} hyperparameters", rows)
    print(machine())


if __name__ == "__main__":
    main()
