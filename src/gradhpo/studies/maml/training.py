"""How each method learns where to start, and how a start is judged."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.delay import update_last
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import Begin, BilevelProblem, Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.estimators.discounted_sum import discounted_sum
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.estimators.reverse import reverse
from gradhpo.examples.maml import META_RATE, RATE, init, loss
from gradhpo.meta import Sinusoids, carried, learned
from gradhpo.transforms import scale_by_tree

__all__ = ["ENTRIES", "STEPS", "Entry", "advance", "draw", "errors", "initial"]

STEPS = 10  # of gradient descent on a test task
REPTILE_STEPS, REPTILE_OUTER = 5, 0.1


class Entry(NamedTuple):
    """A method of this study; a draw is a task, a `Window` of one step."""

    estimator: Estimator  # for one task
    make_optimizer: Any
    begin: Begin
    outer: optax.GradientTransformation
    hyperparams: Callable[[Any], Any]  # to start from, of initial weights
    start: Callable[[Any, Any], tuple[Any, Any]]  # (params, hyperparams) -> weights, rates
    lr_reptile: float = 0.0

    @property
    def problem(self) -> BilevelProblem:
        return BilevelProblem(from_optax(loss, self.make_optimizer), loss, begin=self.begin)


def _as_drawn(task: Any) -> Window:
    return task


def _both_sides(task: Any) -> Window:
    """The points of the support and of the query set, to train on."""
    train = jax.tree.map(lambda *sides: jnp.concatenate(sides, axis=1), *task)
    return jax.tree.map(lambda x: jnp.repeat(x, REPTILE_STEPS, axis=0), Window(train, task.val))


def _rated(hyperparams: Any) -> optax.GradientTransformation:
    return optax.chain(scale_by_tree(hyperparams["rates"]), optax.scale(-1.0))


def _with_equal(rate: Any, weights: Any) -> tuple[Any, Any]:
    return weights, jax.tree.map(lambda w: jnp.full_like(w, rate), weights)


def _of_weights(estimator: Estimator) -> Entry:
    return Entry(
        estimator,
        optax.sgd(RATE),
        learned(_as_drawn),
        optax.adam(META_RATE),
        lambda weights: weights,
        lambda params, lam: _with_equal(RATE, lam),
    )


ENTRIES = {
    "maml": _of_weights(reverse(1)),
    "fomaml": _of_weights(discounted_sum(1.0, 1)),
    "meta_sgd": Entry(
        reverse(1),
        _rated,
        learned(_as_drawn, lambda lam: lam["initial"]),
        optax.adam(META_RATE),
        lambda weights: dict(zip(("initial", "rates"), _with_equal(RATE, weights), strict=True)),
        lambda params, lam: (lam["initial"], lam["rates"]),
    ),
    "reptile": Entry(
        update_last(first_order(), 1, REPTILE_STEPS),
        optax.sgd,  # the only hyperparameter is the rate, and nothing moves it
        carried(_both_sides),
        optax.set_to_zero(),
        lambda weights: RATE,
        lambda params, lam: _with_equal(lam, jax.tree.map(lambda w: w[0], params)),
        lr_reptile=REPTILE_OUTER,
    ),
}


def initial(name: str, seeds: int, tasks: int) -> BilevelState:
    """The states to start from; every leaf has the seeds as its leading axis."""
    entry = ENTRIES[name]
    states = [
        init_state(
            entry.problem,
            over_tasks(entry.estimator, tasks),
            entry.outer,
            weights,
            entry.hyperparams(weights),
        )
        for weights in map(init, range(seeds))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@partial(jax.jit, static_argnums=(0, 1, 2))
def draw(shots: int, queries: int, shape: tuple[int, ...], key: jax.Array) -> Window:
    """Tasks of one step; the arrays of points are `(*shape, 1, shots)` and `(*shape, 1, queries)`.

    In a program of its own: what draws random numbers would be compiled for every method. And with
    one axis, as nested ones take XLA longer.
    """
    sample = Sinusoids(steps=1, shots=shots, queries=queries, fresh=False)
    tasks = jax.vmap(sample)(jax.random.split(key, math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tasks)


@partial(jax.jit, static_argnums=0)
def advance(name: str, states: BilevelState, tasks: Window) -> BilevelState:
    """Some meta-steps of all seeds; arrays of points are (seeds, meta-steps, tasks, 1, points)."""
    entry = ENTRIES[name]
    estimator = over_tasks(entry.estimator, jax.tree.leaves(tasks)[0].shape[2])

    def one(state: BilevelState, tasks: Window) -> BilevelState:
        return run_episodes(
            estimator,
            entry.outer,
            entry.problem,
            state,
            None,
            draws=tasks,
            lr_reptile=entry.lr_reptile,
        )[0]

    return jax.vmap(one)(states, tasks)


@partial(jax.jit, static_argnums=0)
def errors(name: str, states: BilevelState, tasks: Window) -> jax.Array:
    """(seeds, STEPS + 1): mean squared error over the tasks after 0, 1, ... gradient steps."""

    def of_seed(params: Any, hyperparams: Any) -> jax.Array:
        weights, rates = ENTRIES[name].start(params, hyperparams)

        def of_task(task: Window) -> jax.Array:
            support, query = jax.tree.map(lambda x: x[0], task)

            def step(w: Any, _: None) -> tuple[Any, jax.Array]:
                slope = jax.grad(loss)(w, None, support)
                after = jax.tree.map(lambda w, rate, g: w - rate * g, w, rates, slope)
                return after, loss(w, None, query)

            return lax.scan(step, weights, length=STEPS + 1)[1]

        return jnp.mean(jax.vmap(of_task)(tasks), axis=0)

    return jax.vmap(of_seed)(states.params, states.hyperparams)
