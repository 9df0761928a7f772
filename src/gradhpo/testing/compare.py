"""Oracles and error measures."""

import jax
import numpy as np
from jax import lax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.types import Hyper, PyTree, Scalar
from gradhpo.utils._norms import floats, norm
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import check_same_structure, leaves_with_names

__all__ = ["assert_trees_close", "relative_error", "unrolled_loss"]

FLOOR = 1e-12


def unrolled_loss(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    window: Window,
    origin: Origin | None = None,
) -> Scalar:
    """`L_val(w_T(lam), lam)` after plain training over the whole window, a Python loop.

    Its derivative in `lam` is the exact hypergradient: take it with `jax.grad`, or without a model
    state with `central_difference`. The step is compiled, and compiled once if this is not jitted.
    A model state is a constant for the step that reads it.

    Args:
        origin: Of an episode whose start depends on `lam`: training begins from
            `begin_episode(problem, origin, lam)` then, in place of `inner`.

    >>> from gradhpo.testing.problems import initial_weights
    >>> task = initial_weights(3)
    >>> inner, window = task.begin(3)
    >>> loss = lambda lam: unrolled_loss(task.problem, inner, lam, window, task.origin())
    >>> sorted(jax.grad(loss)(task.hyperparams))
    ['a', 'b']
    """
    if origin is not None:
        begun, _ = begin_episode(problem, origin, lam)
        inner = begun._replace(model_state=lax.stop_gradient(begun.model_state))
    assert inner is not None, "without an origin training begins at `inner`"
    step = jax.jit(problem.dynamics.step)
    steps = jax.tree.leaves(window.train)[0].shape[0]
    for t in range(steps):
        batch = jax.tree.map(lambda x: x[t], window.train)  # noqa: B023
        inner = step(inner, lam, batch)
        inner = inner._replace(model_state=lax.stop_gradient(inner.model_state))
    batch = tree_last(window.val)
    return loss_value(problem.outer_loss, inner.params, lam, batch, inner.model_state)


def relative_error(got: PyTree, want: PyTree) -> float:
    """`||got - want|| / max(||want||, 1e-12)` over the whole tree."""
    check_same_structure("the value", want, got)
    differences = [a - b for a, b in zip(floats(got), floats(want), strict=True)]
    return norm(differences) / max(norm(floats(want)), FLOOR)


def assert_trees_close(got: PyTree, want: PyTree, rtol: float, *, leaf_floor: float = 1e-2) -> None:
    """Equal structure, shapes and, within `rtol`, values.

    The error is judged twice: over the whole tree relative to its norm, and leaf by leaf,
    so that a wrong small leaf cannot hide, relative to `max(||leaf||, leaf_floor ||tree||)`.
    NaN is never close, not even to NaN.
    """
    check_same_structure("the value", want, got)
    whole = max(norm(floats(want)), FLOOR)
    error = relative_error(got, want)
    problems = [] if error <= rtol else [f"the whole tree is off by {error:.3g} of its norm"]
    for (name, _), a, b in zip(leaves_with_names(want), floats(got), floats(want), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"leaf {name} has shape {a.shape}, wanted {b.shape}")
        off = norm([a - b]) / max(norm([b]), leaf_floor * whole)
        if not off <= rtol:
            problems.append(f"leaf {name} is off by {off:.3g}: got {_show(a)}, wanted {_show(b)}")
    if problems:
        raise AssertionError(f"not within rtol={rtol:g}: " + "; ".join(problems))


def _show(x: np.ndarray) -> str:
    return np.array2string(x.ravel()[:4], precision=6) + (" …" if x.size > 4 else "")
