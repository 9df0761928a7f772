"""The curves of the study `cosine`, and how they are measured at one state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.delay import update_last
from gradhpo.core.estimator import Cost, Estimator
from gradhpo.core.problem import Window
from gradhpo.core.source import fetch
from gradhpo.core.types import Hyper, Params
from gradhpo.estimators.discounted_sum import discounted_sum
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.estimators.reverse import reverse
from gradhpo.solvers import neumann
from gradhpo.studies.cosine.problems import Family
from gradhpo.utils._precision import float64
from gradhpo.utils.gradients import tree_dot, tree_l2_norm

__all__ = ["GAMMAS", "METHODS", "Agreement", "cost", "measure"]

GAMMAS = (0.0, 0.5, 0.9, 0.99, 0.999)  # of the discounted sum
METHODS = (
    "fo",
    "one_step",
    "N.IFT(2, 1)",
    "N.IFT(10, 1)",
    "drmad",
    "drmad, full",
    "hyperdistill",
    *(f"discounted_sum {gamma:g}" for gamma in GAMMAS),
)
"""In the figure's order. DrMAD once without the optimizer's slots in its Jacobians, as HyperDistill
is fitted, and once with them."""


class Agreement(NamedTuple):
    """Of a method with the exact hypergradient, task by task, (tasks,)."""

    whole: Any  # cosine
    indirect: Any  # cosine of the indirect terms
    ratio: Any  # norm over the exact one's


def _online(rate: float) -> dict[str, Estimator]:
    """Those that look at the last step, one of them with a memory of all before."""
    return {
        "fo": first_order(),
        "one_step": one_step(),
        "N.IFT(2, 1)": implicit(1, neumann(2, rate)),
        "N.IFT(10, 1)": implicit(1, neumann(10, rate)),
        "hyperdistill": hyperdistill(0.99, slots="ignored"),
    }


def _offline(T: int) -> dict[str, Estimator]:
    """Those that look at all T steps."""
    return {"drmad": drmad(T, slots="ignored"), "drmad, full": drmad(T)}


def cost(name: str, T: int, rate: float, size: int) -> Cost:
    """Of one hypergradient after T steps, and of HyperDistill's fit before them."""
    if name.startswith("discounted_sum"):
        return discounted_sum(0.99, T).cost(T, size)
    online = _online(rate)
    return (update_last(online[name], 1, T) if name in online else _offline(T)[name]).cost(T, size)


def measure(family: Family, params: Params, lam: Hyper, window: Window) -> dict[str, Agreement]:
    """Every method at one state.

    Args:
        family: Problem, T and rates.
        params, lam: Where training begins, and with what.
        window: Batches of so many tasks, every leaf with a leading axis of tasks, then of T steps.
    """
    with float64():
        wide = functools.partial(jax.tree.map, _wide)
        found = _measure(family, *wide((params, lam)), wide(window), wide(family.resident))
        found = jax.tree.map(np.asarray, found)
    sums = found.pop("discounted_sum")
    for i, gamma in enumerate(GAMMAS):
        found[f"discounted_sum {gamma:g}"] = Agreement(*(x[:, i] for x in sums))
    return {name: found[name] for name in METHODS}


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _measure(family: Family, params: Params, lam: Hyper, window: Window, resident: Any) -> dict:
    T, problem = family.steps, family.problem
    start = problem.dynamics.init(params, lam)
    online, offline = _online(family.rate), _offline(T)
    distill = online["hyperdistill"]

    def fitted(number: int) -> Any:
        """Memories of HyperDistill with theta fitted to all tasks."""
        many = over_tasks(distill, number)
        starts = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), start)
        batches = fetch(resident, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), window))
        memory = many.init(starts, lam, batches)
        assert many.start is not None and many.reset is not None
        return many.reset(many.start(problem, memory, starts, lam, batches), starts, lam)

    def one(x):
        """A task: its exact hypergradient, and everything beside it."""
        rows, memory = x
        batches = fetch(resident, rows)
        before, last = (
            jax.tree.map(lambda x: x[part], batches)  # noqa: B023
            for part in (slice(-1), slice(-1, None))
        )

        def advance(carry, batch):
            assert distill.advance is not None
            return distill.advance(problem, *carry, lam, batch), None

        (memory, inner), _ = lax.scan(advance, (memory, start), before.train)

        def of_last(name):
            own = memory if name == "hyperdistill" else online[name].init(inner, lam, last)
            return online[name].estimate(problem, own, inner, lam, last).hypergrad

        def of_all(method):
            return method.estimate(problem, (), start, lam, batches).hypergrad

        exact, direct = of_all(reverse(T)), of_last("fo")

        def against(h):
            indirect = (optax.tree.sub(g, direct) for g in (h, exact))
            return Agreement(
                _cosine(h, exact), _cosine(*indirect), tree_l2_norm(h) / tree_l2_norm(exact)
            )

        found = {name: against(of_last(name)) for name in online}
        found |= {name: against(of_all(method)) for name, method in offline.items()}
        # One sweep: the products are the same for all.
        sums = jax.vmap(lambda gamma: against(of_all(discounted_sum(gamma, T))))
        return found | {"discounted_sum": sums(jnp.array(GAMMAS))}

    return lax.map(one, (window, fitted(jax.tree.leaves(window)[0].shape[0])))


def _cosine(a: Hyper, b: Hyper) -> jax.Array:
    """NaN where one of the two is zero, as the indirect term of fo."""
    return tree_dot(a, b) / (tree_l2_norm(a) * tree_l2_norm(b))
