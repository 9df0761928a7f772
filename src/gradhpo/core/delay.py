"""When the hyperparameters move: not after every window of a method, but after some.

A delay are steps that are trained before the window that a method looks at. Within an episode,

    update_every(method, n)      n - 1 windows of training, then an update, and so on
    update_last(method, k, T)    T steps, an update after each of the last k windows

The second is the schedule of "N.IFT(N, K')" in Lee et al. (2022): N products at each of the last K'
steps; the first one explains the numbers of products in their table 2.
"""

import jax

from gradhpo.core.estimator import Cost, Estimator, Loop, check_loop, fold
from gradhpo.utils.settings import check_count

__all__ = ["delayed", "update_every", "update_last"]


def update_every(estimator: Estimator, n: int, *, loop: Loop = "scan") -> Estimator:
    """`estimator` at every n-th of its windows; in the others the weights are trained alone.

    What a method remembers of every step (HyperDistill's w*, D* and S_t) it goes on to remember.

    Args:
        estimator: Any method but those that carry a derivative along the episode (RTHO, PES),
            which have a number of steps per update of their own.
        n: Windows per update, 1 for all.
        loop: How the steps between are looped over, see `gradhpo.core.estimator.fold`.

    Cost: a training gradient for every step between.

    >>> from gradhpo import one_step
    >>> update_every(one_step(), 2).cost(T=100, size=3)
    Cost(gradients=150, products=50)
    """
    n = check_count("n", n)
    if estimator.lead:
        raise ValueError("update_every comes first: update_last(update_every(method, n), k, T).")
    return delayed(estimator, (n - 1) * estimator.unroll_steps, loop=loop)


def update_last(estimator: Estimator, updates: int, T: int) -> Estimator:
    """`estimator` at the last windows of every episode; before, the weights are trained alone.

    Args:
        estimator: As in `update_every`.
        updates: How many windows.
        T: Inner steps of an episode, at least as many as they take.

    >>> from gradhpo import one_step
    >>> update_last(one_step(), 5, T=30).cost(T=30, size=3)
    Cost(gradients=35, products=5)
    """
    updates, T = check_count("updates", updates), check_count("T", T)
    lead = T - updates * estimator.unroll_steps
    if lead < 0:
        raise ValueError(
            f"{updates} windows of {estimator.unroll_steps} steps are more than the T={T} steps of "
            "an episode."
        )
    _check(estimator)
    return estimator._replace(lead=lead)


def delayed(estimator: Estimator, steps: int, *, loop: Loop = "scan") -> Estimator:
    """`estimator` with so many steps more in its window, which are trained first."""
    loop = check_loop(loop)
    if not steps:
        return estimator._replace(lead=0)
    _check(estimator)

    def advance(problem, lam, carry, batch):
        memory, inner = carry
        if estimator.advance is not None:
            return estimator.advance(problem, memory, inner, lam, batch), None
        return (memory, problem.dynamics.step(inner, lam, batch)), None

    def estimate(problem, memory, inner, lam, window):
        before, window = (
            jax.tree.map(lambda x: x[part], window)  # noqa: B023
            for part in (slice(steps), slice(steps, None))
        )
        (memory, inner), _ = fold(advance, problem, lam, (memory, inner), before.train, loop=loop)
        return estimator.estimate(problem, memory, inner, lam, window)

    def price(size):
        assert estimator.price is not None
        gradients, products = estimator.price(size)
        return Cost(gradients + steps * (estimator.tasks or 1), products)

    return estimator._replace(
        estimate=estimate,
        unroll_steps=steps + estimator.unroll_steps,
        starts=False,
        lead=0,
        price=None if estimator.price is None else price,
    )


def _check(estimator: Estimator) -> None:
    if estimator.follows:
        raise ValueError(
            "this method carries a derivative along the episode, step by step, so no step can be "
            "taken without it: give its own unroll_steps, inner steps per update."
        )
