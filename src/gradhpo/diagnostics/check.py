"""The exact hypergradient of a window of training, and every method against it."""

from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from gradhpo.algorithms.registry import METHODS
from gradhpo.core.dynamics import InnerState, linearize
from gradhpo.core.estimator import Estimator, roll
from gradhpo.core.problem import outer_gradients
from gradhpo.core.start import pull_start
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper
from gradhpo.diagnostics.episode import Episode, begin_in_float64, loss_after
from gradhpo.diagnostics.flops import arithmetic
from gradhpo.diagnostics.measure import measure
from gradhpo.diagnostics.methods import choose
from gradhpo.diagnostics.momentum import at_once
from gradhpo.diagnostics.rows import HypergradientCheck
from gradhpo.utils._precision import float64
from gradhpo.utils.finite_differences import richardson
from gradhpo.utils.gradients import tree_is_finite, tree_last
from gradhpo.utils.settings import check_choice, check_count

__all__ = ["check_hypergradient"]


def check_hypergradient(
    task: Task,
    steps: int,
    methods: Iterable[str] | Mapping[str, Estimator | str] | None = None,
    *,
    truth: str = "reverse",
    inner: InnerState | None = None,
    key: Any = None,
) -> HypergradientCheck:
    """Compare methods with the exact hypergradient of a window of training.

    Args:
        task: Problem, start and data. Its hyperparameters are held fixed; the last of the `steps`
            validation batches is the one that judges. Sources that are functions are called, with
            64-bit types on.
        steps: T, the training steps of the window.
        methods: Names (`known_methods()`), or a mapping from names of your choice to estimators
            (or names). None runs the common ones that need no setting, two implicit methods among
            them, which assume a minimum.
        truth: "reverse" (memory for T states), "forward" (one column per hyperparameter),
            or "differences": Richardson's, four runs per hyperparameter, independent of all
            derivatives.
        inner: The state of a run under way, slots and model state included, to look at the window
            that begins there (`state.inner` of a `BilevelState`); it does not depend on the
            hyperparameters. None: an episode begins, from `task.params` or as `problem.begin` says.
        key: The draw for `problem.begin`; None: `jax.random.key(0)`.

    A start that depends on the hyperparameters (`problem.begin`, the slots of the optimizer) is
    part of the truth; methods that take s_0 for a constant are off by `alpha_0 ds_0/dlam`. A model
    state is not differentiated, by the methods or by the truth: in the runs of "differences" every
    step reads what the undisturbed run has left there.

    Floating leaves are cast to float64 for the time of the check; a loss that casts to
    float32 inside limits what "exact" can mean. One program is compiled per method.

    Raises:
        TypeError: `task` or `inner` is something else.
        ValueError: no step, fewer batches than steps, an unknown method or truth, or a truth that
            is not finite; the message says at which step.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gradhpo import BilevelProblem, InOrder, Task, from_optax
    >>> loss = lambda w, lam, batch: jnp.sum((w - batch) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2)
    >>> judge = lambda w, lam, batch: jnp.sum((w - batch) ** 2)
    >>> problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    >>> batches = InOrder(jnp.ones((5, 2)))
    >>> task = Task(problem, jnp.zeros(2), -1.0, train=batches, val=batches)
    >>> got = check_hypergradient(task, 5, ["fo", "reverse"])
    >>> print(got.rows["reverse"].cosine, got.rows["fo"].norm_ratio)
    1.0 0.0
    """
    if not isinstance(task, Task):
        raise TypeError(
            f"check_hypergradient(task, steps) takes a gradhpo.Task, got {type(task).__name__}: "
            "Task(problem, params, hyperparams, train=..., val=...); batches that are stacked "
            "already are a source gradhpo.InOrder(batches)."
        )
    if inner is not None and not isinstance(inner, InnerState):
        raise TypeError(
            f"inner must be a gradhpo.InnerState, such as state.inner, got {type(inner).__name__}; "
            "weights to start from are task.params: task.replace(params=...)."
        )
    chosen = choose(methods)
    check_choice("truth", truth, ("reverse", "forward", "differences"))
    steps = check_count("steps", steps)
    with float64():
        episode = begin_in_float64(task.stored, steps, inner, key)
        problem, start, lam, window = episode[:4]
        loss, exact = _truth(truth, episode)
        if not (np.isfinite(loss) and tree_is_finite(exact)):
            raise ValueError(_first_bad(episode))
        train = jax.make_jaxpr(partial(roll, problem.dynamics))
        training = arithmetic(train(start, lam, window.train))[0]
        rows = {name: measure(choice, episode, exact, training) for name, choice in chosen.items()}
        as_numpy = jax.tree.map(np.asarray, exact)
        seen = at_once(problem, start, lam, jax.tree.map(lambda x: x[0], window.train))
    return HypergradientCheck(MappingProxyType(rows), truth, as_numpy, float(loss), steps, seen)


def _truth(name: str, episode: Episode) -> tuple[Any, Hyper]:
    """`(L_val, h)` after the whole window."""
    problem, inner, lam, window, origin, steps, loop = episode
    if name == "differences":
        loss = loss_after(episode)
        return loss(lam), richardson(loss, lam)
    loop = loop if name == "reverse" else "scan"  # forward mode is one program
    estimate = partial(METHODS[name].estimator(steps, loop).estimate, problem, ())
    estimate = estimate if loop == "host" else jax.jit(estimate)
    got = estimate(inner, lam, window, origin)
    return got.info["val_loss"], got.hypergrad


def _first_bad(episode: Episode) -> str:
    """Where the exact hypergradient stops being finite."""
    problem, inner, lam, window, origin, steps, _ = episode
    if not tree_is_finite(inner):
        return (
            "there is no exact hypergradient to compare with: the state that training starts from "
            "holds NaN or infinity."
        )
    step = jax.jit(problem.dynamics.step)
    batches = [jax.tree.map(lambda x: x[t], window.train) for t in range(steps)]  # noqa: B023
    states = [inner]
    for t, batch in enumerate(batches, start=1):
        states.append(step(states[-1], lam, batch))
        if not tree_is_finite(states[-1]):
            return (
                f"there is no exact hypergradient to compare with: training leaves NaN or infinity "
                f"in the state at step {t} of {steps}. Look for NaN in that batch, or a learning "
                "rate that is too large."
            )
    loss, alpha, direct = outer_gradients(problem, states[-1], lam, tree_last(window.val))
    if not np.isfinite(loss):
        return (
            f"there is no exact hypergradient to compare with: training is finite, but the "
            f"validation loss after step {steps} is {loss}. Look at the last validation batch."
        )
    where = "of the validation loss itself" if not tree_is_finite((alpha, direct)) else ""
    for t in range(steps, 0, -1):
        if where:
            break
        alpha, term = linearize(problem.dynamics, states[t - 1], lam, batches[t - 1])[1](alpha)
        if not tree_is_finite((alpha, term)):
            where = f"of step {t} of {steps}"
    if not where and not tree_is_finite(pull_start(problem, origin, lam, alpha)):
        where = "of the start"
    return (
        "there is no exact hypergradient to compare with: the losses are finite, but the "
        f"derivative {where} is not. With Adam set eps_root=1e-8: its square root has no "
        "derivative at zero."
    )
