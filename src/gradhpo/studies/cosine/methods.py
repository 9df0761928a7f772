"""The curves of the study `cosine`, and how they are measured at one state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.delay import update_every
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


def _methods(T: int, rate: float) -> dict[str, Estimator]:
    """Each looks at windows of T steps: the online ones train, and remember, until the last."""
    return {
        "fo": update_every(first_order(), T),
        "one_step": update_every(one_step(), T),
        "N.IFT(2, 1)": implicit(T, neumann(2, rate)),
        "N.IFT(10, 1)": implicit(T, neumann(10, rate)),
        "drmad": drmad(T, slots="ignored"),
        "drmad, full": drmad(T),
        "hyperdistill": update_every(hyperdistill(0.99, slots="ignored"), T),
    }


def cost(name: str, T: int, rate: float, size: int) -> Cost:
    """Of one hypergradient after T steps, and of HyperDistill's fit before them."""
    if name.startswith("discounted_sum"):
        return discounted_sum(0.99, T).cost(T, size)
    return _methods(T, rate)[name].cost(T, size)


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
    inner = problem.dynamics.init(params, lam)
    number = jax.tree.leaves(window)[0].shape[0]
    methods = _methods(T, family.rate)

    def hypergrad(method, memory, batches):
        return method.estimate(problem, memory, inner, lam, batches).hypergrad

    def fitted() -> Any:
        """Memories of HyperDistill with theta fitted to all tasks."""
        many = over_tasks(methods["hyperdistill"], number)
        inners = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), inner)
        batches = fetch(resident, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), window))
        memory = many.init(inners, lam, batches)
        assert many.start is not None and many.reset is not None
        return many.reset(many.start(problem, memory, inners, lam, batches), inners, lam)

    def one(x):
        """A task: its exact hypergradient, and everything beside it."""
        rows, memory = x
        batches = fetch(resident, rows)
        exact = hypergrad(reverse(T), (), batches)
        direct = hypergrad(methods["fo"], (), batches)

        def against(h):
            indirect = (optax.tree.sub(g, direct) for g in (h, exact))
            return Agreement(
                _cosine(h, exact), _cosine(*indirect), tree_l2_norm(h) / tree_l2_norm(exact)
            )

        found = {}
        for name, method in methods.items():
            own = memory if name == "hyperdistill" else method.init(inner, lam, batches)
            found[name] = against(hypergrad(method, own, batches))
        found["discounted_sum"] = jax.vmap(
            lambda gamma: against(hypergrad(discounted_sum(gamma, T), (), batches))
        )(jnp.array(GAMMAS))  # one sweep: the products are the same for all
        return found

    return lax.map(one, (window, fitted()))


def _cosine(a: Hyper, b: Hyper) -> jax.Array:
    """NaN where one of the two is zero, as the indirect term of fo."""
    return tree_dot(a, b) / (tree_l2_norm(a) * tree_l2_norm(b))
