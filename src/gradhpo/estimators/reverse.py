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

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import register_dataclass

from gradhpo.core.dynamics import InnerState, linearize
from gradhpo.core.estimator import (
    Cost,
    Estimate,
    Estimator,
    Loop,
    Unrolled,
    check_loop,
    count_steps,
    fold,
    report,
    roll,
    whole,
)
from gradhpo.core.problem import BilevelProblem, Window, outer_gradients
from gradhpo.core.start import pull_start
from gradhpo.core.types import Batch, Hyper
from gradhpo.estimators._kept import bytes_of, carried, keep, recall
from gradhpo.estimators._segments import Span, cut, levels_for, segments
from gradhpo.estimators.reversible import reversible, reversible_gradients
from gradhpo.utils.gradients import tree_l2_norm, tree_last
from gradhpo.utils.settings import check_choice, check_count

__all__ = ["reverse", "unrolled_gradients"]


def reverse(
    unroll_steps: int,
    *,
    truncate: int | None = None,
    memory: str = "trajectory",
    budget: int | None = None,
    loop: Loop = "scan",
) -> Estimator:
    """The derivative of the validation loss after `unroll_steps` inner steps.

    Args:
        unroll_steps: Horizon T. The hypergradient is exact for the whole window; what happened
            before it is a constant.
        truncate: Only the last K steps are differentiated (None: all). 1 is the one-step
            method, 0 the direct term alone.
        memory: "trajectory", "segments" or "reversible", see above. The numbers are the same,
            up to the rounding of reversible training.
        budget: Bytes that stored states may take, for "segments": the fewest levels that
            fit are chosen, each costing one more forward sweep. None: one level of about
            sqrt(T) segments. The loops that a level adds take memory too, which is not
            counted: from three levels on it can be more than the level saves.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: T training gradients forwards; K gradients and second-order
    products backwards, K more gradients per level of segments; one validation gradient.
    Memory: K states ("trajectory"), about 2 sqrt(K) ("segments").
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    loop = check_loop(loop)
    kept = check_count("truncate", truncate, minimum=0) if truncate is not None else unroll_steps
    if kept > unroll_steps:
        raise ValueError(
            f"truncate must be at most the {unroll_steps} steps of the window, got {kept}."
        )
    memory = check_choice("memory", memory, ("trajectory", "segments", "reversible"))
    if budget is not None:
        budget = check_count("budget", budget)
        if memory != "segments":
            raise ValueError('budget= says how much memory="segments" may use; give both.')
    if memory == "reversible":
        _check_whole(truncate)
        return reversible(unroll_steps, loop=loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def estimate(problem, state, inner, lam, window, origin=None):
        got = unrolled_gradients(
            problem, inner, lam, window, truncate=kept, memory=memory, budget=budget, loop=loop
        )
        hypergrad, info = whole(_sum, loop)(problem, got, origin, lam)
        return Estimate(hypergrad, got.inner, state, info)

    starts = kept == unroll_steps  # else alpha ends at s_{T-K}
    again = kept if memory == "segments" else 0  # of one level; with a budget there may be more
    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        hosted=loop == "host",
        metrics=("alpha_growth",),
        starts=starts,
        price=None if budget else lambda size: Cost(unroll_steps + kept + again + 1, kept),
    )


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
    total = count_steps(window.train)
    steps = total if truncate is None else truncate
    levels = ()
    if memory == "segments":
        levels = levels_for(steps, *bytes_of(problem, inner, lam), budget)
    training = _Training(problem, lam, window.train, levels, loop)

    inner = replace(training, levels=()).run(inner, Span(0, total - steps))
    span = Span(total - steps, steps)
    inner, stored = training.forward(inner, span)
    loss, direct, carry = whole(_judge, loop)(problem, inner, lam, window.val)
    size = carry[2]
    initial, indirect, largest = training.backward(inner, stored, span, carry)
    growth = largest / jnp.where(size == 0, 1.0, size)
    return Unrolled(loss, direct, indirect, initial, inner, growth)


def _judge(problem, inner, lam, val):
    """`L_val`, its direct term, and the `carry` with which the backward sweep begins."""
    loss, alpha, direct = outer_gradients(problem, inner, lam, tree_last(val))
    return loss, direct, (alpha, optax.tree.zeros_like(lam), tree_l2_norm(alpha))


def _sum(problem, got, origin, lam):
    """The hypergradient from its terms, and what is reported of it."""
    indirect = optax.tree.add(got.indirect, pull_start(problem, origin, lam, got.initial))
    hypergrad = optax.tree.add(got.direct, indirect)
    return hypergrad, report(got.val_loss, got.direct, indirect, alpha_growth=got.growth)


def _check_whole(truncate: int | None) -> None:
    if truncate is not None:
        raise ValueError("memory='reversible' runs the whole window backwards; drop truncate=.")


# -- spans of steps --------------------------------------------------------------------------


@partial(
    register_dataclass, data_fields=["lam", "batches"], meta_fields=["problem", "levels", "loop"]
)
@dataclass(frozen=True)
class _Training:
    """A training run whose spans of steps are run forwards and swept backwards.

    Without levels a span stores its trajectory. With levels it stores the states at the starts
    of its segments, and a segment is a span of `inside`, which has one level fewer. The steps
    left over make the head, a shorter segment at the beginning of the span.

    A pytree, so that it can be the constants of `fold`; what is not an array is static.
    """

    problem: BilevelProblem
    lam: Hyper
    batches: Batch  # of the whole window: a span's are cut out when its steps are run
    levels: tuple[int, ...]  # lengths of the segments, longest first
    loop: Loop

    def forward(self, inner: InnerState, span: Span) -> tuple[InnerState, Any]:
        """The state after a span, and what `backward` needs of it."""
        if not self.levels:
            return self._steps(_step_forward, inner, cut(self.batches, span))
        head, starts = segments(span, self.levels[0])
        first, inner = inner, self.inside.run(inner, head)
        inner, states = self._segments(_segment_forward, inner, starts)
        return inner, (first, states)

    def backward(self, inner: InnerState, stored: Any, span: Span, carry: Any) -> Any:
        """`carry = (alpha, h, largest |alpha|)` taken from the end of a span to its start.

        `inner` and `stored` are what `forward` returned of the span.
        """
        if not self.levels:
            carry = (carried(self.problem, self.lam, inner), carry)
            xs = (stored, cut(self.batches, span))
            return self._steps(_step_backward, carry, xs, reverse=True)[0][1]
        head, starts = segments(span, self.levels[0])
        first, states = stored
        carry, _ = self._segments(_segment_backward, carry, (states, starts), reverse=True)
        return self.inside.forward_and_backward(first, head, carry)

    def forward_and_backward(self, inner: InnerState, span: Span, carry: Any) -> Any:
        """`backward` over a span of which only the first state, `inner`, was stored."""
        if not span.steps:
            return carry
        inner, stored = self.forward(inner, span)
        return self.backward(inner, stored, span, carry)

    def run(self, inner: InnerState, span: Span) -> InnerState:
        """The state after a span. Nothing is stored."""
        if not span.steps:
            return inner
        if not self.levels:
            batches = cut(self.batches, span)
            return roll(self.problem.dynamics, inner, self.lam, batches, loop=self.loop)
        head, starts = segments(span, self.levels[0])
        inner = self.inside.run(inner, head)
        return self._segments(_segment_run, inner, starts)[0]

    @property
    def inside(self) -> "_Training":
        """The same run, for the spans that are segments of this one's."""
        return replace(self, levels=self.levels[1:])

    def segment(self, start: Array) -> Span:
        return Span(start, self.levels[0])

    def _steps(self, body, carry, xs, *, reverse=False):
        return fold(body, self.problem, self.lam, carry, xs, loop=self.loop, reverse=reverse)

    def _segments(self, body, carry, xs, *, reverse=False):
        return fold(body, self.problem, self, carry, xs, loop=self.loop, reverse=reverse)


# Bodies of loops, at module level because the host loop compiles one per identity. Those of one
# step have `lam` alone as constants, so that they are compiled once for windows of any length.


def _step_forward(problem, lam, inner, batch):
    return problem.dynamics.step(inner, lam, batch), keep(problem, lam, inner)


def _step_backward(problem, lam, carry, x):
    after, (alpha, h, largest) = carry
    kept, batch = x
    inner, gradient = recall(problem, lam, after, kept)
    _, pullback = linearize(problem.dynamics, inner, lam, batch, gradient)
    alpha, term = pullback(alpha)  # alpha_{t-1} = alpha_t A_t, and alpha_t B_t
    largest = jnp.maximum(largest, tree_l2_norm(alpha).astype(largest.dtype))
    return (carried(problem, lam, inner), (alpha, optax.tree.add(h, term), largest)), None


def _segment_forward(problem, training, inner, start):
    return _segment_run(problem, training, inner, start)[0], inner


def _segment_backward(problem, training, carry, x):
    del problem  # it is the training's
    inner, start = x
    return training.inside.forward_and_backward(inner, training.segment(start), carry), None


def _segment_run(problem, training, inner, start):
    del problem
    return training.inside.run(inner, training.segment(start)), None
