"""W3 with jaxopt's `root_vjp`: `python w3_jaxopt.py PROBLEM.npz ROUNDS`."""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import implicit_diff, linear_solve

SOLVERS = {
    "solve_cg": linear_solve.solve_cg,
    "solve_normal_cg (its default)": linear_solve.solve_normal_cg,
}


def cross_entropy(w, x, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w), y[:, None], 1))


def main(path, rounds):
    z = np.load(path)
    w, lam = (jnp.asarray(z[key], jnp.float32) for key in ("W", "lam"))
    data = tuple(jnp.asarray(z[key]) for key in ("x", "y", "xv", "yv"))

    def condition(w, lam, x, y):
        penalised = jax.grad(cross_entropy)(w, x, y)
        return penalised + jnp.exp(lam)[:, None] * w

    for name, solver in SOLVERS.items():

        @jax.jit
        def hypergradient(w, lam, x, y, xv, yv, solver=solver):
            cotangent = jax.grad(cross_entropy)(w, xv, yv)
            solve = functools.partial(solver, tol=1e-6, maxiter=1000)
            at = functools.partial(condition, x=x, y=y)
            return implicit_diff.root_vjp(at, w, (lam,), cotangent, solve=solve)[0]

        got = np.asarray(jax.block_until_ready(hypergradient(w, lam, *data)), float)
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            jax.block_until_ready(hypergradient(w, lam, *data))
            seconds.append(time.process_time() - start)
        error = np.linalg.norm(got - z["hypergrad"]) / np.linalg.norm(z["hypergrad"])
        print(json.dumps({"solver": name, "seconds": seconds, "error": float(error)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
