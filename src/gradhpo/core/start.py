"""How an episode begins: s_0, and where the start says so its data, from lam and a draw.

    (s_0, window) = begin(phi, lam, draw),    h <- h + alpha_0 ds_0/dlam

phi are the weights that the last episode has left behind, and the draw is a PRNG key or a task. So
initial weights, their scale, or a whole initial network can be hyperparameters. The slots of the
optimizer begin by `Dynamics.init`, whose dependence on lam counts as well.
"""

from typing import Any, NamedTuple

import jax
import optax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.losses import has_model_state
from gradhpo.core.problem import BilevelProblem, Start, Window
from gradhpo.core.types import Hyper, Params, PyTree
from gradhpo.utils._partition import split

__all__ = ["Origin", "begin_episode", "pull_start", "push_start"]


class Origin(NamedTuple):
    """What s_0 was made from beside lam. An estimator that carries alpha to s_0 is given it with
    the first window of an episode, where s_0 depends on lam."""

    phi: InnerState  # what the last episode has left behind; its slots are not read
    draw: Any  # a PRNG key or a task, for `problem.begin`


def begin_episode(
    problem: BilevelProblem, origin: Origin, lam: Hyper
) -> tuple[InnerState, Window | None]:
    """`(s_0, window)`; the window is None where the start says nothing of data.

    Raises:
        TypeError: `begin` returns something else than a `Start`.
    """
    phi = origin.phi
    started = Start(phi.params)
    if problem.begin is not None:
        started = problem.begin(phi.params, lam, origin.draw)
        if not isinstance(started, Start):
            raise TypeError(
                "begin(params, hyperparams, draw) must return a gradhpo.Start, such as "
                f"Start(params), but returned {type(started).__name__}."
            )
    made = problem.dynamics.init(started.params, lam)
    if not has_model_state(made.model_state):
        given = has_model_state(started.model_state)
        made = made._replace(model_state=started.model_state if given else phi.model_state)
    return made, None if started.window is None else Window(*started.window)


def pull_start(
    problem: BilevelProblem, origin: Origin | None, lam: Hyper, alpha: InnerState
) -> Hyper:
    """`alpha_0 ds_0/dlam`; zeros without an origin."""
    if origin is None:
        return optax.tree.zeros_like(lam)
    _, pullback = jax.vjp(lambda lam: _floating(problem, origin, lam), lam)
    return pullback((alpha.params, alpha.opt_state))[0]


def push_start(
    problem: BilevelProblem, origin: Origin, lam: Hyper, direction: Hyper
) -> tuple[Params, PyTree]:
    """`(ds_0/dlam) direction`, over the floating leaves of weights and slots."""
    return jax.jvp(lambda lam: _floating(problem, origin, lam), (lam,), (direction,))[1]


def _floating(problem: BilevelProblem, origin: Origin, lam: Hyper) -> tuple[Params, PyTree]:
    inner, _ = begin_episode(problem, origin, lam)
    return split((inner.params, inner.opt_state))[0]
