"""One-step lookahead hypergradient (T1-T2).

Luketina et al. (2016), "Scalable Gradient-Based Tuning of Continuous Regularization
Hyperparameters", section 2. With s_t = Phi(s_{t-1}, lam; D_t):

    h_t = dL_val/dlam + alpha_t B_t,    alpha_t = dL_val/ds_t,    B_t = dPhi/dlam at s_{t-1}

Everything before the last step is a constant: exact for a horizon of one step,
short-sighted for a longer one (Wu et al. 2018: learning rates are driven too low).

With gamma > 0 the Jacobian is taken at the running average w* of HyperDistill's eq. (13)
instead of at s_{t-1}; this variant stands in no paper, it is the public package's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import InnerState, Taken, join, take
from gradhpo.core.estimator import Cost, Estimate, Estimator, report
from gradhpo.core.problem import judge
from gradhpo.core.types import Hyper
from gradhpo.utils._partition import scalar_dtype, split
from gradhpo.utils.gradients import tree_last, tree_lerp
from gradhpo.utils.settings import check_fraction

__all__ = ["AverageMemory", "Product", "exact_product", "lookahead", "one_step"]

Product = Callable[..., Taken]
"""`(dynamics, inner, lam, batch) -> step`, whose pullback is `alpha -> alpha B`."""


class AverageMemory(NamedTuple):
    """Running average of the states of an episode."""

    w_star: InnerState  # w*_t over the floating leaves of s, None elsewhere
    weight: jax.Array  # S_t = gamma S_{t-1} + 1


def one_step(gamma: float = 0.0) -> Estimator:
    """The exact last term of the hypergradient.

    Args:
        gamma: 0 is T1-T2 as published; in (0, 1] B_t is taken at the average w*_t.

    Cost: one training gradient, one validation gradient, one mixed product per update;
    memory one gradient, and a copy of the state if gamma > 0.
    """
    return lookahead(exact_product, gamma, Cost(2, 1))


def exact_product(dynamics, inner, lam, batch) -> Taken:
    """`alpha B` by automatic differentiation."""
    taken = take(dynamics, inner, lam, batch)
    return taken._replace(pullback=lambda alpha: taken.pullback(alpha)[1])


def lookahead(product: Product, gamma: float, cost: Cost) -> Estimator:
    """One-step lookahead with a choice of how the mixed product is evaluated, at what cost."""
    gamma = check_fraction("gamma", gamma)

    def init(inner, lam, window):
        del window
        return fresh_average(inner, lam) if gamma else ()

    def estimate(problem, memory, inner, lam, window):
        dynamics, batch = problem.dynamics, tree_last(window)
        if gamma:
            memory, point = average(memory, inner, gamma)  # w*_t, from w_{t-1}
            mixed = product(dynamics, point, lam, batch.train).pullback
            inner, said = dynamics.step(inner, lam, batch.train), {}  # s_t
        else:
            inner, mixed, said = product(dynamics, inner, lam, batch.train)
        loss, alpha, direct, judged = judge(problem, inner, lam, batch.val)
        indirect = mixed(alpha)  # alpha_t B_t
        hypergrad = optax.tree.add(direct, indirect)
        return Estimate(hypergrad, inner, memory, report(loss, direct, indirect), said | judged)

    def reset(memory, inner, lam):
        del memory
        return fresh_average(inner, lam)

    def advance(problem, memory, inner, lam, batch):
        memory, _ = average(memory, inner, gamma)
        return memory, problem.dynamics.step(inner, lam, batch)

    own = {"reset": reset, "advance": advance} if gamma else {}
    return Estimator(init, estimate, **own, price=lambda size: cost)


def fresh_average(inner: InnerState, lam: Hyper) -> AverageMemory:
    """The empty average, of weight zero. Its buffers are its own: a caller may donate them."""
    floating, _ = split((inner.params, inner.opt_state))
    return AverageMemory(
        InnerState(*optax.tree.zeros_like(floating)), jnp.zeros((), scalar_dtype(lam))
    )


def average(
    memory: AverageMemory, inner: InnerState, gamma: float
) -> tuple[AverageMemory, InnerState]:
    """Take `inner` into the average; return it also as a full state to evaluate Phi at.

    `w*_t = p_t w*_{t-1} + (1 - p_t) w_{t-1}` with `1 - p_t = 1 / S_t` (Lee et al. 2022,
    eq. 13). Integer and key leaves are those of the newest state.
    """
    weight = gamma * memory.weight + 1
    floating, rest = split((inner.params, inner.opt_state))
    w_star = tree_lerp(tuple(memory.w_star[:2]), floating, 1 / weight)
    memory = memory._replace(w_star=InnerState(*w_star), weight=weight)
    return memory, join(w_star, rest, inner.model_state)
