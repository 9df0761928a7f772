"""Where a task begins, and how it is learned without tuning anything.

Three initialisations are one line each. Reptile (Nichol et al. 2018) carries the weights from
episode to episode, `carried` with `lr_reptile`. MAML (Finn et al. 2017) makes them
hyperparameters, `learned` with `gradhpo.reverse`, whose hypergradient goes back to the start.
FOMAML is the same with `gradhpo.discounted_sum(1.0, T)`: the products of state Jacobians are left
out.
"""

from collections.abc import Callable
from typing import Any

import jax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Loop, roll
from gradhpo.core.problem import Begin, BilevelProblem, Start, Window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.types import Hyper, Params, PyTree

__all__ = ["Sample", "adapt", "carried", "learned"]

Sample = Callable[[jax.Array], Window]
"""A distribution of tasks as a function from a PRNG key to the batches of one task, every leaf with
the T steps as its leading axis. It is pure, traced, and mapped over the keys of a meta-batch."""


def carried(sample: Sample) -> Begin:
    """Every task begins at phi, the weights that the last episode has left behind.

    >>> from gradhpo.meta import Sinusoids
    >>> print(carried(Sinusoids(steps=3))(0.5, None, jax.random.key(0)).params)
    0.5
    """

    def begin(params: Params, hyperparams: Hyper, draw: Any) -> Start:
        del hyperparams
        return Start(params, sample(draw))

    return begin


def learned(sample: Sample, initial: Callable[[Hyper], Params] = lambda lam: lam) -> Begin:
    """Every task begins at weights that are hyperparameters.

    Args:
        initial: Finds them among the others, `initial(hyperparams) -> params`.

    >>> from gradhpo.meta import Sinusoids
    >>> begin = learned(Sinusoids(steps=3), lambda lam: lam["w"])
    >>> begin(0.5, {"w": 2.0, "log_lr": -1.0}, jax.random.key(0)).params
    2.0
    """

    def begin(params: Params, hyperparams: Hyper, draw: Any) -> Start:
        del params
        return Start(initial(hyperparams), sample(draw))

    return begin


def adapt(
    problem: BilevelProblem,
    params: Params,
    hyperparams: Hyper,
    draw: Any,
    *,
    model_state: PyTree = (),
    data: PyTree = None,
    loop: Loop = "scan",
) -> tuple[InnerState, Window]:
    """One task learned with the hyperparameters as they are: `(s_T, batches)`.

    Args:
        problem: With a `begin` that brings the batches.
        params: phi.
        draw: For `begin`, usually a PRNG key; map this function over many of them to test.
        data: Where `begin` picks rows of a `gradhpo.Pool`: its arrays, `pool.data`. The rows that
            come back find their examples by `gradhpo.core.source.gather(pool.data, rows)`.
        loop: How steps are looped over, see `gradhpo.core.estimator.fold`.

    Cost: T training gradients.

    Raises:
        ValueError: `begin` brings no batches.
    """
    origin = Origin(InnerState(params, (), model_state), draw)
    inner, window = begin_episode(problem, origin, hyperparams)
    if window is None:
        raise ValueError(
            "adapt learns a task from the batches that begin returns, Start(params, window), and "
            "the begin of this problem returns none."
        )
    return roll(problem.dynamics, inner, hyperparams, window.train, data=data, loop=loop), window
