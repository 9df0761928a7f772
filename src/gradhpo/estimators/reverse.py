"""Reverse mode (RMD, back-propagation through training): the exact hypergradient.

Maclaurin et al. (2015), Franceschi et al. (2017), Shaban et al. (2019). Forwards
s_t = Phi(s_{t-1}, lam; D_t); then alpha_T = dL_val/ds_T, h = dL_val/dlam, and for t = T..1

    h <- h + alpha_t B_t,    alpha_{t-1} = alpha_t A_t

On exit alpha_0 = dL_val/ds_0, the derivative with respect to the initial state. Truncated
to the last K steps, h misses at most ||alpha_T|| ||B|| rho^K / (1 - rho) where ||A_t|| <= rho < 1.

What the backward sweep reads of s_{t-1} comes in one of three ways:

    "trajectory"  every state; of an optimizer of `gradhpo.transforms` that tells its last
                  update, only the slots: w_{t-1} = w_t - U_t
    "segments"    the states at the starts of segments, the others computed again, one
                  segment at a time; segments of segments if the memory asks for it
    "reversible"  nothing: training is run backwards, see `gradhpo.estimators.reversible`
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradhpo.core.dynamics import InnerState, join, linearize
from gradhpo.core.estimator import (
    Estimate,
    Estimator,
    Loop,
    Unrolled,
    check_loop,
    fold,
    report,
    roll,
)
from gradhpo.core.problem import BilevelProblem, Window, outer_gradients
from gradhpo.core.start import pull_start
from gradhpo.core.types import Hyper
from gradhpo.estimators.reversible import reversible, reversible_gradients
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_bytes, tree_l2_norm, tree_last
from gradhpo.utils.validation import check_choice, check_count

__all__ = ["levels_for", "reverse", "unrolled_gradients"]


def reverse(
    steps: int,
    *,
    truncate: int | None = None,
    memory: str = "trajectory",
    budget: int | None = None,
    loop: Loop = "scan",
) -> Estimator:
    """The derivative of the validation loss after `steps` inner steps.

    Args:
        steps: Horizon T. The hypergradient is exact for the whole window; what happened
            before it is a constant.
        truncate: Only the last K steps are differentiated (None: all). 1 is the one-step
            method, 0 the direct term alone.
        memory: "trajectory", "segments" or "reversible", see above. The numbers are the same,
            up to the rounding of reversible training.
        budget: Bytes that stored states may take, for "segments": the fewest levels that
            fit are chosen, each costing one more forward sweep. None: one level of about
            sqrt(T) segments.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: T training gradients forwards; K gradients and second-order
    products backwards, K more gradients per level of segments; one validation gradient.
    Memory: K states ("trajectory"), about 2 sqrt(K) ("segments").
    """
    steps = check_count("steps", steps)
    loop = check_loop(loop)
    kept = check_count("truncate", truncate, minimum=0) if truncate is not None else steps
    if kept > steps:
        raise ValueError(f"truncate must be at most the {steps} steps of the window, got {kept}.")
    memory = check_choice("memory", memory, ("trajectory", "segments", "reversible"))
    if budget is not None:
        budget = check_count("budget", budget)
        if memory != "segments":
            raise ValueError('budget= says how much memory="segments" may use; give both.')
    if memory == "reversible":
        _check_whole(truncate)
        return reversible(steps, loop=loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def estimate(problem, state, inner, lam, window, origin=None):
        got = unrolled_gradients(
            problem, inner, lam, window, truncate=kept, memory=memory, budget=budget, loop=loop
        )
        indirect = optax.tree.add(got.indirect, pull_start(problem, origin, lam, got.initial))
        hypergrad = optax.tree.add(got.direct, indirect)
        info = report(got.val_loss, got.direct, indirect, alpha_growth=got.growth)
        return Estimate(hypergrad, got.inner, state, info)

    whole = kept == steps  # else alpha ends at s_{T-K}
    return Estimator(init, estimate, window=steps, metrics=("alpha_growth",), starts=whole)


def unrolled_gradients(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    window: Window,
    *,
    truncate: int | None = None,
    memory: str = "trajectory",
    budget: int | None = None,
    loop: Loop = "scan",
) -> Unrolled:
    """What `reverse` is made of, with the derivative with respect to the initial state.

    Args:
        problem: The dynamics and the validation loss.
        inner: s_0; lam: hyperparameters.
        window: T train batches and T validation batches, of which the last one counts.
        truncate, memory, budget, loop: As in `reverse`. With `truncate=K`, `initial` is the
            derivative with respect to s_{T-K}.

    >>> from gradhpo import from_update
    >>> problem = BilevelProblem(
    ...     from_update(lambda w, lam, batch: w - lam * w), lambda w, lam, batch: w
    ... )
    >>> batches = Window(jnp.zeros(3), jnp.zeros(3))
    >>> got = unrolled_gradients(problem, InnerState(8.0, ()), 0.5, batches)
    >>> print(got.val_loss, got.indirect, got.initial.params)  # w_T = w_0 (1 - lam)^3
    1.0 -6.0 0.125
    """
    if memory == "reversible":
        _check_whole(truncate)
        return reversible_gradients(problem, inner, lam, window, loop=loop).gradients
    total = _steps(window.train)
    steps = total if truncate is None else truncate
    span = (total - steps, steps)
    inner = _run((), loop, problem, lam, inner, window.train, (0, total - steps))
    levels = ()
    if memory == "segments":
        levels = levels_for(steps, *_bytes(problem, inner, lam), budget)

    inner, stored = _forward(levels, loop, problem, lam, inner, window.train, span)
    loss, alpha, direct = outer_gradients(problem, inner, lam, tree_last(window.val))
    size = tree_l2_norm(alpha)
    carry = (alpha, optax.tree.zeros_like(lam), size)
    carry = _backward(levels, loop, problem, lam, inner, stored, window.train, span, carry)
    initial, indirect, largest = carry
    growth = largest / jnp.where(size == 0, 1.0, size)
    return Unrolled(loss, direct, indirect, initial, inner, growth)


def _check_whole(truncate: int | None) -> None:
    if truncate is not None:
        raise ValueError("memory='reversible' runs the whole window backwards; drop truncate=.")


# -- one level: a trajectory ---------------------------------------------------------------


def _retraceable(problem: BilevelProblem, lam: Hyper) -> Any:
    """The inner optimizer, if its slots tell the last update; else None."""
    parts = problem.dynamics.parts
    optimizer = None if parts is None else parts.make_optimizer(lam)
    return optimizer if hasattr(optimizer, "last_updates") else None


def _keep(problem: BilevelProblem, lam: Hyper, inner: InnerState) -> InnerState:
    """What the sweep back to s_{t-1} needs of it: all, or all but the weights."""
    if _retraceable(problem, lam) is None:
        return inner
    return inner._replace(params=split(inner.params)[1])


def _carried(problem: BilevelProblem, lam: Hyper, inner: InnerState) -> InnerState | None:
    """s_t, where s_{t-1} is made from it."""
    return None if _retraceable(problem, lam) is None else inner


def _recall(
    problem: BilevelProblem, lam: Hyper, after: Any, kept: InnerState
) -> tuple[InnerState, Any]:
    """s_{t-1} from s_t and what was kept; and the gradient there, or None if unknown."""
    optimizer = _retraceable(problem, lam)
    if optimizer is None:
        return kept, None
    weights = optax.tree.sub(split(after.params)[0], optimizer.last_updates(after.opt_state))
    slots, rest = split(kept.opt_state)
    inner = join((weights, slots), (kept.params, rest), kept.model_state)
    told = getattr(optimizer, "last_gradients", None)
    return inner, None if told is None else told(kept.opt_state, after.opt_state)


def _store_step(problem, lam, inner, batch):
    return problem.dynamics.step(inner, lam, batch), _keep(problem, lam, inner)


def _pull_step(problem, lam, carry, x):
    after, (alpha, acc, largest) = carry
    kept, batch = x
    inner, gradient = _recall(problem, lam, after, kept)
    _, pullback = linearize(problem.dynamics, inner, lam, batch, gradient)
    alpha, term = pullback(alpha)  # alpha_{t-1} = alpha_t A_t, alpha_t B_t
    largest = jnp.maximum(largest, tree_l2_norm(alpha).astype(largest.dtype))
    return (_carried(problem, lam, inner), (alpha, optax.tree.add(acc, term), largest)), None


# -- levels: segments of segments ------------------------------------------------------------
# A span is (first step, number of steps). Only the innermost one's batches are cut out, when
# it is run, so that the data are never copied whole.


def _forward(levels, loop, problem, lam, inner, batches, span):
    """`(s, stored)` after a span: its trajectory, or the states at the starts of its segments.

    `levels` are the lengths of the segments, longest first; the steps that are left over
    make a shorter first segment.
    """
    if not levels:
        return fold(_store_step, problem, lam, inner, _cut(batches, span), loop=loop)
    head, starts = _segments(span, levels[0])
    first = inner
    inner = _run(levels[1:], loop, problem, lam, inner, batches, head)
    store = _store_segment(levels, loop)
    inner, states = fold(store, problem, (lam, batches), inner, starts, loop=loop)
    return inner, (first, states)


def _backward(levels, loop, problem, lam, inner, stored, batches, span, carry):
    if not levels:
        xs = (stored, _cut(batches, span))
        carry = (_carried(problem, lam, inner), carry)
        return fold(_pull_step, problem, lam, carry, xs, loop=loop, reverse=True)[0][1]
    head, starts = _segments(span, levels[0])
    first, states = stored
    consts, xs = (lam, batches), (states, starts)
    pull = _pull_segment(levels, loop)
    carry, _ = fold(pull, problem, consts, carry, xs, loop=loop, reverse=True)
    return _sweep(levels[1:], loop, problem, lam, first, batches, head, carry)


def _sweep(levels, loop, problem, lam, inner, batches, span, carry):
    """There and back again over one span."""
    if not span[1]:
        return carry
    inner, stored = _forward(levels, loop, problem, lam, inner, batches, span)
    return _backward(levels, loop, problem, lam, inner, stored, batches, span, carry)


def _run(levels, loop, problem, lam, inner, batches, span):
    """There, storing nothing."""
    if not span[1]:
        return inner
    if not levels:
        return roll(problem.dynamics, inner, lam, _cut(batches, span), loop=loop)
    head, starts = _segments(span, levels[0])
    inner = _run(levels[1:], loop, problem, lam, inner, batches, head)
    run = _run_segment(levels, loop)
    return fold(run, problem, (lam, batches), inner, starts, loop=loop)[0]


@functools.cache  # one identity per setting, as `fold` asks
def _run_segment(levels, loop):
    def body(problem, consts, inner, start):
        lam, batches = consts
        span = (start, levels[0])
        return _run(levels[1:], loop, problem, lam, inner, batches, span), None

    return body


@functools.cache
def _store_segment(levels, loop):
    run = _run_segment(levels, loop)

    def body(problem, consts, inner, start):
        return run(problem, consts, inner, start)[0], inner

    return body


@functools.cache
def _pull_segment(levels, loop):
    def body(problem, consts, carry, x):
        lam, batches = consts
        inner, start = x
        span = (start, levels[0])
        return _sweep(levels[1:], loop, problem, lam, inner, batches, span, carry), None

    return body


def _cut(batches, span):
    start, length = span
    if _steps(batches) == length:
        return batches
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), batches)


def _segments(span, length):
    """The span of the steps left over, and where the full segments start."""
    start, steps = span
    rest = steps % length
    return (start, rest), start + jnp.arange(rest, steps, length)


def _steps(batches):
    leaves = jax.tree.leaves(batches)
    if not leaves:
        raise ValueError("a batch needs at least one array; give a dummy, such as 0.0.")
    return leaves[0].shape[0]


def levels_for(steps: int, state: int, kept: int, budget: int | None = None) -> tuple[int, ...]:
    """Lengths of the segments, longest first, for the fewest levels that fit.

    Args:
        steps: Steps T to reverse.
        state: Bytes of one state, which a segment's start stores.
        kept: Bytes stored per step of the innermost segment.
        budget: Bytes for all of them; None asks for one level.

    With d levels about `(d + 1) T^(1 / (d + 1))` states are alive and every step is run d
    times more.

    >>> levels_for(100, state=8, kept=8), levels_for(1000, 8, 8, budget=300)
    ((10,), (100, 10))

    Raises:
        ValueError: even the smallest plan needs more than the budget; the message says how much.
    """
    if steps < 2:
        return ()
    plans = []
    for depth in range(0 if budget else 1, steps.bit_length()):
        # d levels of r segments and an innermost one of r state / kept steps, in balance.
        parts = max((steps * kept / state) ** (1 / (depth + 1)), 1.5)
        ends = [steps, *(round(steps / parts**level) for level in range(1, depth + 1))]
        lengths = tuple(max(length, 1) for length in ends[1:])
        starts = sum(math.ceil(a / max(b, 1)) for a, b in itertools.pairwise(ends))
        plans.append((starts * state + max(ends[-1], 1) * kept, lengths))
        if budget is None or plans[-1][0] <= budget:
            return lengths
    raise ValueError(
        f"reversing {steps} steps takes at least {min(plans)[0]} bytes of stored states "
        f"({state} each), more than the budget of {budget}. Raise it, or truncate."
    )


def _bytes(problem: BilevelProblem, inner: InnerState, lam: Hyper) -> tuple[int, int]:
    """Bytes of a state, and of what is kept of one."""
    kept = jax.eval_shape(lambda lam, inner: _keep(problem, lam, inner), lam, inner)
    return tree_bytes(inner), max(tree_bytes(kept), 1)
