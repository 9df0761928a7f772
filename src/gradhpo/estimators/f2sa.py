"""F2SA: a penalty in place of the Hessian; first derivatives only.

Kwon et al. (2023), "A fully first-order method for stochastic bilevel optimization",
algorithm 1. Two copies of the weights: z, the ones that are trained, tends to argmin L_tr, y
to argmin L_val + kappa L_tr. Per update, with one batch of either kind for every step:

    z   <- Phi(z, lam; D_t)                                          t = 1..T
    y   <- y + c U(grad_w L_tr(y, lam; D_t) + grad_w L_val(y, lam; V_t) / kappa)
    h    = dL_val/dlam(y) + kappa (dL_tr/dlam(y) - dL_tr/dlam(z))    on D_T, V_T

U is the update of the inner optimizer. Its gradient for y is the paper's over kappa, which has
the same zero: so the inner learning rate suits y for every kappa (the paper's rates alpha_k
shrink like 1/kappa for this). c is for what else sets the two rates apart: with SGD of rate
gamma for z, the paper's alpha_k is c gamma / kappa.

With both at their minima h differs from the hypergradient through the minimum by
O(1/kappa); the difference of two close numbers loses a factor kappa of precision, so in
float32 kappa beyond 1e3 gains nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.curvature import (
    check_reached,
    condition_of,
    training_loss,
    warn_of_custom_rules,
)
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, fold, report
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import outer_gradients
from gradhpo.core.step import strengthen
from gradhpo.core.types import OptState, Params
from gradhpo.estimators._apply import apply_gradient, guarded
from gradhpo.utils._partition import merge, split
from gradhpo.utils.gradients import tree_l2_norm, tree_last, tree_scale
from gradhpo.utils.schedules import Schedule, check_schedule, value_at
from gradhpo.utils.settings import check_count

__all__ = ["F2saMemory", "f2sa", "growing_penalty"]


class F2saMemory(NamedTuple):
    """What F2SA carries; y survives an episode, its optimizer slots restart like z's."""

    y: Params  # over the floating leaves of w, None elsewhere
    slots: OptState  # of the inner optimizer, for y
    updates: jax.Array  # so far, for the penalty and the scale of y's steps


def growing_penalty(count: Any) -> Any:
    """`kappa = 1 + count / 10`, as in the benchmark code of bilevel optimization.

    >>> growing_penalty(40)
    5.0
    """
    return 1.0 + 0.1 * count


def f2sa(
    unroll_steps: int = 10,
    penalty: Schedule = growing_penalty,
    y_scale: Schedule = 1.0,
    *,
    loop: Loop = "scan",
) -> Estimator:
    """Hypergradients of the minimum without second derivatives, and with their bias.

    Args:
        unroll_steps: Inner steps T per update, of z and of y.
        penalty: kappa > 0: a number, or a function of the count of updates, growing (the
            bias is O(1/kappa)), but slower than y can follow.
        y_scale: c > 0, the steps of y in those of the inner optimizer: a number, or a
            function of the count of updates.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per update: 2 T + 2 training gradients, T + 1 validation gradients, no product.
    Memory: one further state (weights and slots).

    `info`: `penalty` is kappa, `distance` is ||y - z||, O(1/kappa) if both are where they
    should be, `stationarity` is ||grad_w L_tr(z)||; `val_loss` is that of z, which is
    what is trained.

    Raises:
        ValueError: (when traced) an opaque `update_fn`, which takes its gradient itself.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    penalty = check_schedule("penalty", penalty)
    y_scale = check_schedule("y_scale", y_scale)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del lam, window
        y, _ = split(inner.params)
        return F2saMemory(y, inner.opt_state, jnp.zeros((), jnp.int32))

    def body(problem, consts, carry, batch):
        lam, kappa, scale = consts
        z, y = carry
        of_train, _ = _gradients(training_loss(problem, "f2sa"), y, lam, batch.train)
        _, alpha, _ = outer_gradients(problem, y, lam, batch.val)
        gradient = optax.tree.add(of_train, tree_scale(1 / kappa, alpha.params))
        y = apply_gradient(problem, y, lam, gradient, "f2sa", scale)
        z = problem.dynamics.step(z, lam, batch.train)
        return (z, y._replace(model_state=z.model_state)), None  # y has no statistics of its own

    def estimate(problem, memory, inner, lam, window):
        last = tree_last(window)
        loss = training_loss(problem, "f2sa")
        check_reached(problem, condition_of(loss, inner), inner, lam, last, "f2sa")
        warn_of_custom_rules(loss, inner, lam, last.train, "f2sa")
        kappa = value_at(penalty, memory.updates)
        y = InnerState(_weights(memory.y, inner), memory.slots, inner.model_state)
        consts = lam, kappa, value_at(y_scale, memory.updates)
        (z, y), _ = fold(body, problem, consts, (inner, y), window, loop=loop)

        _, _, direct = outer_gradients(problem, y, lam, last.val)
        _, at_y = _gradients(loss, y, lam, last.train)
        gradient, at_z = _gradients(loss, z, lam, last.train)
        indirect = tree_scale(kappa, optax.tree.sub(at_y, at_z))
        y_floating, z_floating = split(y.params)[0], split(z.params)[0]
        distance = tree_l2_norm(optax.tree.sub(y_floating, z_floating))
        info = report(
            loss_value(problem.outer_loss, z.params, lam, last.val, z.model_state),
            direct,
            indirect,
            stationarity=tree_l2_norm(gradient),
            penalty=jnp.asarray(kappa),
            distance=distance,
        )
        updates = jnp.asarray(optax.safe_increment(memory.updates))
        memory = F2saMemory(y_floating, y.opt_state, updates)
        hypergrad = guarded(optax.tree.add(direct, indirect), y_floating)
        return Estimate(hypergrad, z, memory, info)

    def reset(memory, inner, lam):
        del lam
        return memory._replace(slots=strengthen(inner.opt_state))

    metrics = ("stationarity", "penalty", "distance")
    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        reset=reset,
        metrics=metrics,
        price=lambda size: Cost(3 * unroll_steps + 3, 0),
    )


def _weights(floating: Params, inner: InnerState) -> Params:
    """`floating` with the integer and key leaves of the trained weights."""
    return merge(floating, split(inner.params)[1])


def _gradients(loss: Any, inner: InnerState, lam: Any, batch: Any) -> tuple[Any, Any]:
    """`(dL_tr/dw, dL_tr/dlam)` by one reverse sweep."""
    w, rest = split(inner.params)

    def value(w, lam):
        return loss_value(loss, merge(w, rest), lam, batch, inner.model_state)

    return jax.grad(value, argnums=(0, 1))(w, lam)
