"""A batch of tasks: any method on several of them at once, their hypergradients averaged.

Over n tasks, each with an inner state, a memory and data of its own,

    h = (1/n) sum_i h_i,    h_i the method's hypergradient of task i

which is what a meta-batch is in MAML (Finn et al. 2017, algorithm 1, line 8). Where an episode
begins, and with which data, is said by `BilevelProblem.begin`, which gets a draw for every task.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.estimator import Cost, Estimate, Estimator
from gradhpo.core.problem import Window
from gradhpo.core.status import Status
from gradhpo.utils.settings import check_count
from gradhpo.utils.validation import leaves_with_names

__all__ = ["over_tasks"]

TASKS = "gradhpo tasks"  # the axis of `vmap`, for means over it


def over_tasks(estimator: Estimator, tasks: int) -> Estimator:
    """`estimator`, mapped over tasks with `vmap`; the hypergradient is the mean.

    Args:
        estimator: The method for one task.
        tasks: Their number n. Every leaf of the inner state and of the memory has n entries along
            its leading axis, every leaf of a window along its second, after the step.

    What a method fits before an episode (HyperDistill's theta) is fitted to all tasks together.

    Cost: n times the method's, in one program. A task that leaves NaN behind makes the finite
    guard undo the step for all. The metrics are means; the status is that of the first task in
    which something happened.

    >>> from gradhpo import BilevelProblem, InnerState, from_update, one_step
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * batch), lambda w, l, b: w
    ... )
    >>> method = over_tasks(one_step(), 2)
    >>> inner, data = InnerState(jnp.zeros(2), ()), jnp.array([[1.0, 3.0]])
    >>> print(method.estimate(problem, (), inner, jnp.array(0.5), Window(data, data)).hypergrad)
    -2.0
    """
    tasks = check_count("tasks", tasks)

    def init(inner, lam, window):
        if window is None:
            return jax.vmap(lambda inner: estimator.init(inner, lam, None))(inner)
        _check(window, tasks)
        return jax.vmap(lambda i, w: estimator.init(i, lam, w), in_axes=(0, 1))(inner, window)

    def estimate(problem, memory, inner, lam, window, origin=None):
        _check(window, tasks)

        def one(memory, inner, window, origin):
            return estimator.estimate(problem, memory, inner, lam, window, origin)

        got = jax.vmap(one, in_axes=(0, 0, 1, 0))(memory, inner, window, origin)
        hypergrad = jax.tree.map(lambda x: jnp.mean(x, axis=0), got.hypergrad)
        info = {name: jnp.mean(x) for name, x in got.info.items() if name != "status"}
        if "status" in got.info:
            status = got.info["status"]
            info["status"] = status[jnp.argmax(status != Status.OK)]
        return Estimate(hypergrad, got.inner, got.memory, info, got.reported)

    def advance(problem, memory, inner, lam, batch):
        def one(memory, inner, batch):
            if estimator.advance is not None:
                return estimator.advance(problem, memory, inner, lam, batch)
            return memory, problem.dynamics.step(inner, lam, batch)

        return jax.vmap(one)(memory, inner, batch)

    made = estimator._replace(
        init=init, estimate=estimate, advance=advance, tasks=tasks, hosted=False
    )
    if (prepare := estimator.start) is not None:
        extra = (lambda x: jax.lax.pmean(x, TASKS),) if estimator.pools else ()

        def start(problem, memory, inner, lam, window):
            _check(window, tasks)
            one = jax.vmap(
                lambda m, i, w: prepare(problem, m, i, lam, w, *extra),
                in_axes=(0, 0, 1),
                axis_name=TASKS,
            )
            return one(memory, inner, window)

        made = made._replace(start=start)
    if (renew := estimator.reset) is not None:

        def reset(memory, inner, lam):
            return jax.vmap(lambda memory, inner: renew(memory, inner, lam))(memory, inner)

        made = made._replace(reset=reset)
    if (room := estimator.room) is not None:

        def make(memory, window):
            one = jax.eval_shape(lambda window: jax.tree.map(lambda x: x[:, 0], window), window)
            return jax.vmap(lambda memory: room.make(memory, one))(memory)

        made = made._replace(room=room._replace(make=make))
    if (price := estimator.price) is not None:
        made = made._replace(price=lambda size: _times(tasks, price(size)))
    if (fit := estimator.start_price) is not None:
        made = made._replace(start_price=lambda steps: _times(tasks, fit(steps)))
    return made._replace(iterations=tasks * estimator.iterations)


def _times(tasks: int, cost: Cost) -> Cost:
    return Cost(tasks * cost.gradients, tasks * cost.products)


def _check(window: Window, tasks: int) -> None:
    for name, leaf in leaves_with_names(window):
        if np.shape(leaf)[1:2] != (tasks,):
            raise ValueError(
                f"every leaf of a window needs the {tasks} tasks along its second axis, after the "
                f"step; but window{name} has the shape {np.shape(leaf)}. A source makes one batch "
                "for each task, stacked; or begin returns the batches with the start of each."
            )
