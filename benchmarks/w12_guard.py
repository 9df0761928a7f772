"""W12, the finite guard: one outer step with its checks and statuses, and the same without them.

Without them the step is the estimate, the outer update and the metrics, taken as they are. Problems
are those of W1 (a small network, a rate per weight) and of W5 (a convolutional net, a rate or an
example weight per hyperparameter). Counts alone: nothing is run.

    python benchmarks/w12_guard.py --core 0
"""

import functools

import jax
import optax
import w1_tutorial
import w5_convolution
from _common import Row, arguments, bytes_moved, compiled, flops, machine, show

import gradhpo as gh
from gradhpo.core.outer import as_outer
from gradhpo.core.step import measured

BAR = 1.02


def unguarded(estimator, outer):
    """`bilevel_step` without the finite guard, statuses and their counts."""

    def step(problem, state, window, lr_hyper=None):
        lam, update = state.hyperparams, as_outer(outer, lr_hyper)
        estimate = estimator.estimate(problem, state.memory, state.inner, lam, window)
        new_lam, slots = update.apply(estimate.hypergrad, state.outer_opt_state, lam)
        metrics = measured(estimator, update, problem, state, estimate, window)
        return state.update(
            params=estimate.inner.params,
            inner_opt_state=estimate.inner.opt_state,
            model_state=estimate.inner.model_state,
            hyperparams=new_lam,
            outer_opt_state=slots,
            step=state.step + 1,
            memory=estimate.memory,
            metadata=metrics,
        )

    return step


def cases():
    """`{name: (problem, estimator, outer optimizer, weights, hyperparameters, window)}`."""
    found = {}
    data, rows, w, lam = w1_tutorial.make_problem(1)
    loss = w1_tutorial.bilevel_loss
    problem = gh.BilevelProblem(gh.from_update(w1_tutorial.phi), loss, loss)
    window = gh.Window(
        *(w1_tutorial.take(side, i[0, :1]) for side, i in zip(data, rows, strict=True))
    )
    methods = {"one_step": gh.one_step(), "hyperdistill": gh.hyperdistill(0.99)}
    for name, estimator in methods.items():
        found[f"tutorial, {name}"] = problem, estimator, optax.adam(1e-3), w, lam, window
    for kind in w5_convolution.KINDS:
        train, val, w, lam = w5_convolution.make_problem(kind)
        problem = gh.BilevelProblem(
            gh.from_update(w5_convolution.PHI[kind]),
            w5_convolution.judge,
            w5_convolution.TRAIN_LOSS[kind],
        )
        window = jax.tree.map(lambda x: x[None, : w5_convolution.BATCH], gh.Window(train, val))
        for name, estimator in methods.items():
            found[f"conv, {kind}, {name}"] = problem, estimator, optax.adam(1e-3), w, lam, window
    return found


def programs(case):
    """`{"with": executable, "without": executable}`, the state donated as in a loop."""
    problem, estimator, outer, w, lam, window = case
    state = gh.init_state(problem, estimator, outer, w, lam, window)
    steps = {"with": gh.bilevel_step(estimator, outer), "without": unguarded(estimator, outer)}
    return {
        key: compiled(functools.partial(step, problem), state, window, donate=(0,))
        for key, step in steps.items()
    }


def figures():
    """Flops and bytes moved of one step."""
    found = {}
    for name, case in cases().items():
        for key, executable in programs(case).items():
            found[f"w12/{name}, {key}/flops"] = flops(executable)
            found[f"w12/{name}, {key}/bytes"] = bytes_moved(executable)
    return found


def main():
    arguments(__doc__)
    print(machine())
    found, rows = figures(), []
    for name in cases():
        for count in ("flops", "bytes"):
            value = found[f"w12/{name}, with/{count}"] / found[f"w12/{name}, without/{count}"]
            rows.append(Row(name, f"{count}, with / without", value, BAR))
    show("W12, the finite guard", rows)


if __name__ == "__main__":
    main()
