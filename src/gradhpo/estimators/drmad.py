"""DrMAD: reverse mode along a straight line instead of the stored trajectory.

Fu et al. (2016), "DrMAD: Distilling Reverse-Mode Automatic Differentiation for Optimizing
Hyperparameters of Deep Neural Networks". Only s_0 and s_T are kept; the sweep back of
`gradhpo.estimators.reverse` is taken through

    s^_{t-1} = (1 - beta_t) s_0 + beta_t s_T,    beta_t = (t - 1) / T

for the step that maps w_{t-1} to w_t. (The paper says only that beta runs between 0 and 1;
this choice alone is exact on a straight line at uniform speed.) Step counts and keys take
their true values.
"""

import optax

from gradhpo.core.dynamics import join, linearize, without_slots
from gradhpo.core.estimator import (
    Cost,
    Estimate,
    Estimator,
    Loop,
    check_loop,
    fold,
    report,
    whole,
)
from gradhpo.core.start import pull_start
from gradhpo.estimators._line import walk
from gradhpo.utils.gradients import tree_lerp
from gradhpo.utils.settings import check_choice, check_count

__all__ = ["drmad"]


def drmad(unroll_steps: int, *, slots: str = "differentiated", loop: Loop = "scan") -> Estimator:
    """Approximate reverse mode with the memory of two states.

    Args:
        unroll_steps: Horizon T.
        slots: Of the inner optimizer: "differentiated" carries alpha through the whole state,
            "ignored" through the weights alone, A = I - eta H whatever the momentum, by which the
            numbers of Lee et al. (2022) come out.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Exact where training moves on a straight line at uniform speed, and for one step.

    Cost per outer update: T training gradients forwards; T gradients and second-order
    products backwards; one validation gradient. Memory: two states and the step counts.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    slots = check_choice("slots", slots, ("differentiated", "ignored"))
    loop = check_loop(loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def backward(problem, consts, carry, x):
        lam, (first, last) = consts
        alpha, acc = carry
        beta, batch, (rest, model_state, _) = x
        line = join(tree_lerp(first, last, beta), rest, model_state)  # s^_{t-1}
        _, pullback = linearize(problem.dynamics, line, lam, batch)
        alpha, term = pullback(alpha)  # alpha_t A_t and alpha_t B_t on the line
        alpha = without_slots(alpha) if slots == "ignored" else alpha
        return (alpha, optax.tree.add(acc, term)), None

    def estimate(problem, memory, inner, lam, window, origin=None):
        line = walk(problem, inner, lam, window, loop=loop)
        consts, carry = (lam, line.ends), (line.alpha, optax.tree.zeros_like(lam))
        carry, _ = fold(backward, problem, consts, carry, line.xs, loop=loop, reverse=True)
        alpha, indirect = carry
        terms = (line.direct, indirect, alpha)
        hypergrad, info = whole(_sum, loop)(problem, origin, lam, line.val_loss, terms)
        return Estimate(hypergrad, line.inner, memory, info)

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        hosted=loop == "host",
        starts=True,
        price=lambda size: Cost(2 * unroll_steps + 1, unroll_steps),
    )


def _sum(problem, origin, lam, loss, terms):
    """The hypergradient and what is reported of it."""
    direct, indirect, alpha = terms
    indirect = optax.tree.add(indirect, pull_start(problem, origin, lam, alpha))
    return optax.tree.add(direct, indirect), report(loss, direct, indirect)
