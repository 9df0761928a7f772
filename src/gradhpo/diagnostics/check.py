"""The exact hypergradient of a window of training, and every method against it."""

from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.algorithms.registry import METHODS
from gradhpo.core.dynamics import InnerState, linearize
from gradhpo.core.estimator import Estimator, roll
from gradhpo.core.inspect import check_problem
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem, Window, check_window, outer_gradients
from gradhpo.core.step import strengthen
from gradhpo.core.types import Hyper, Params
from gradhpo.diagnostics.flops import arithmetic
from gradhpo.diagnostics.measure import measure
from gradhpo.diagnostics.methods import choose
from gradhpo.diagnostics.rows import HypergradientCheck
from gradhpo.utils.finite_differences import richardson
from gradhpo.utils.gradients import tree_is_finite, tree_last
from gradhpo.utils.validation import check_hyperparams, check_params

__all__ = ["check_hypergradient"]

TRUTHS = ("reverse", "forward", "differences")


def check_hypergradient(
    problem: BilevelProblem,
    params: Params | InnerState,
    hyperparams: Hyper,
    window: Window,
    methods: Iterable[str] | Mapping[str, Estimator | str] | None = None,
    *,
    truth: str = "reverse",
) -> HypergradientCheck:
    """Compare methods with the exact hypergradient of a window of training.

    Args:
        problem: Dynamics and validation loss, as for `bilevel_step`.
        params: Weights at the start of the window; or an `InnerState`, to start with the
            optimizer's slots of a run under way.
        hyperparams: lam, held fixed.
        window: T train batches and T validation batches, stacked along the leading axis; the
            last validation batch is the one that judges.
        methods: Names (`known_methods()`), or a mapping from names of your choice to estimators
            (or names). None runs the common ones that need no setting, two implicit methods among
            them, which assume a minimum.
        truth: "reverse" (memory for T states), "forward" (one column per hyperparameter),
            or "differences": Richardson's, four runs per hyperparameter, independent of all
            derivatives.

    Floating leaves are cast to float64 for the time of the check; a loss that casts to
    float32 inside limits what "exact" can mean. One program is compiled per method.

    Raises:
        ValueError: no window, an unknown method or truth, or a truth that is not finite; the
            message says at which step.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gradhpo import from_optax
    >>> loss = lambda w, lam, batch: jnp.sum((w - batch) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2)
    >>> judge = lambda w, lam, batch: jnp.sum((w - batch) ** 2)
    >>> problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    >>> window = Window(jnp.ones((5, 2)), jnp.ones((5, 2)))
    >>> got = check_hypergradient(problem, jnp.zeros(2), -1.0, window, ["fo", "reverse"])
    >>> print(got.rows["reverse"].cosine, got.rows["fo"].norm_ratio)
    1.0 0.0
    """
    chosen = choose(methods)
    if truth not in TRUTHS:
        raise ValueError(f"truth must be one of {', '.join(TRUTHS)}, got {truth!r}.")
    window = Window(*window)
    steps = check_window(window)
    if not steps:
        raise ValueError("the window is empty: give the batches of at least one step.")
    with _float64():
        lam, window = _wide(hyperparams), _wide(window)
        check_hyperparams(lam)
        inner = params
        if not isinstance(params, InnerState):
            check_params(params)
            inner = problem.dynamics.init(strengthen(_wide(params)), lam)
        inner = strengthen(_wide(inner))
        check_problem(problem, inner, lam, window)
        loss, exact = _truth(truth, problem, inner, lam, window, steps)
        if not (np.isfinite(loss) and tree_is_finite(exact)):
            raise ValueError(_first_bad(problem, inner, lam, window, steps))
        train = jax.make_jaxpr(partial(roll, problem.dynamics))
        training = arithmetic(train(inner, lam, window.train))[0]
        rows = {
            name: measure(choice, problem, inner, lam, window, steps, exact, training)
            for name, choice in chosen.items()
        }
        as_numpy = jax.tree.map(np.asarray, exact)
    return HypergradientCheck(MappingProxyType(rows), truth, as_numpy, float(loss), steps)


def _float64() -> Any:
    """64-bit types for a while; the context manager has moved between versions of JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64()


def _wide(tree: Any) -> Any:
    """Floating leaves as float64 arrays; integers and keys as they are."""

    def wide(x):
        return jnp.asarray(x, jnp.float64 if jnp.issubdtype(_dtype(x), jnp.floating) else None)

    return jax.tree.map(wide, tree)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _truth(name, problem, inner, lam, window, steps) -> tuple[Any, Hyper]:
    """`(L_val, h)` after the whole window."""

    def loss(lam):
        end = roll(problem.dynamics, inner, lam, window.train)
        batch = tree_last(window.val)
        return loss_value(problem.outer_loss, end.params, lam, batch, end.model_state)

    if name == "differences":
        return jax.jit(loss)(lam), richardson(jax.jit(loss), lam)
    exact = METHODS[name].estimator(steps)

    @jax.jit
    def estimate(inner, lam, window):
        return exact.estimate(problem, (), inner, lam, window)

    got = estimate(inner, lam, window)
    return got.info["val_loss"], got.hypergrad


def _first_bad(problem, inner, lam, window, steps) -> str:
    """Where the exact hypergradient stops being finite."""
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
    return (
        "there is no exact hypergradient to compare with: the losses are finite, but the "
        f"derivative {where} is not. With Adam set eps_root=1e-8: its square root has no "
        "derivative at zero."
    )
