"""HyperDistill: online hypergradient distillation.

Lee et al. (2022), "Online Hyperparameter Meta-Learning with Hypergradient Distillation".
The second-order term of the whole episode so far is replaced by one product at distilled
weights and data, scaled by one fitted number (eqs. 10-12):

    h_t = dL_val/dlam + pi_t f_t,    f_t = v_t / ||v_t||,    pi_t = theta ||v_t|| S_t
    v_t = alpha_t dPhi(w*_t, lam; D*_t)/dlam,    S_t = 1 + gamma + ... + gamma^(t-1)

The norm cancels, pi_t f_t = theta S_t v_t; that is what is computed, so nothing is divided
by zero. The distilled point is a running average (eq. 13), S_t = gamma S_{t-1} + 1:

    w*_t = p_t w*_{t-1} + (1 - p_t) w_{t-1},    1 - p_t = 1 / S_t
    D*_t = every slot keeps its example with probability p_t, else takes D_t's  (eq. 14)

theta is fitted by walking DrMAD's line backwards (eqs. 15-18, algorithm 4); see `fit`. Under
the assumption it is 1; ours is a guard that refuses a fit which no training that forgets
explains (`TOLERANCE`, `GOOD`).

Exact when the products B_t depend on neither w nor D and A_t = gamma I; gamma = 0 with
theta = 1 is the one-step method.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.dynamics import InnerState, join, linearize, without_slots
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, Room, check_loop, fold, report
from gradhpo.core.problem import Window, check_window, outer_gradients
from gradhpo.core.status import Status
from gradhpo.core.types import Batch
from gradhpo.estimators._line import walk
from gradhpo.estimators.one_step import average, fresh_average
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import avals, tree_dot, tree_last, tree_lerp, tree_scale
from gradhpo.utils.settings import (
    check_choice,
    check_fraction,
    check_not_negative,
    check_seed,
    unless_traced,
)

__all__ = ["DistillMemory", "has_examples", "hyperdistill"]

TOLERANCE = 1.1
"""How far theta may exceed T / S_T. At step t the method puts theta S_t v_t in the place of t
terms. Training that forgets nothing, A_t = I, makes their sum t v_t for equal terms, which the
fit answers with a theta between 1 and T / S_T; one above it says that the past counts for more
than it did when it was the present. The tenth is for draws of D* and terms of unequal length."""

GOOD = 0.7
"""R^2 that a theta above 1 needs. Training that forgets nothing makes equal terms, which one number
fits with an R^2 of 3/4 or more, whatever gamma is; if it does not, the number comes from something
else, such as momentum. A theta below 1 may fit badly: it says that the past counts for little."""


class DistillMemory(NamedTuple):
    """What HyperDistill carries; independent of the horizon."""

    w_star: InnerState  # w*_t over the floating leaves of s, None elsewhere
    weight: jax.Array  # S_t
    data: Batch  # D*_t; None until the shape of a batch is known, () if it has no examples
    theta: jax.Array  # scale of the distilled term
    theta_fit: jax.Array  # the last fitted value, accepted or not; NaN before the first fit
    theta_r2: jax.Array  # R^2 of that fit (of y_s by theta x_s); NaN before it
    theta_cosine: jax.Array  # mean cosine between v_s and g_s; NaN before the fit
    status: jax.Array  # THETA_REJECTED after a fit that was refused
    key: jax.Array  # root key, never consumed: draws use fold_in(key, draws)
    draws: jax.Array  # so far, over all episodes


def hyperdistill(
    gamma: float = 0.99,
    *,
    theta: float | None = None,
    points: str = "line",
    slots: str = "differentiated",
    sampling: str = "bernoulli",
    theta_guard: bool = True,
    seed: int = 0,
    loop: Loop = "scan",
) -> Estimator:
    """Online hypergradients with the memory of one step and a horizon beyond it.

    Args:
        gamma: Discount in [0, 1]. The paper chooses among 0.9, 0.99, 0.999, 0.9999.
        theta: None fits it in `start`; a number fixes it (the paper uses 1 where the
            direct term vanishes).
        points: "line" averages points of DrMAD's line in the fit (constant memory);
            "trajectory" averages the true states, as eq. (17) prints, and stores T of them.
        slots: Of the inner optimizer, in the fit: "differentiated" carries alpha through the whole
            state; "ignored" through the weights alone, A = I - eta H whatever the momentum. With
            momentum the published numbers come out only so, and theta stays below 1: that the
            authors did it is our inference.
        sampling: "bernoulli" draws every slot of D* by itself; "round" replaces exactly
            n - round(n p) of n slots, as in the paper. Beware: it admits no new example
            once n (1 - p) < 1/2.
        theta_guard: Keep the previous theta when the fit is not in (0, 1.1 T / S_T], T steps
            of the fit, or above 1 with an R^2 below 0.7: a negative one would reverse every
            update, a larger one comes from training that forgets nothing and grows. The status
            says so.
        seed: Of the draws of D*.
        loop: How the fit loops over steps, see `gradhpo.core.estimator.fold`.

    Cost per update: one training gradient, one validation gradient, one mixed product at
    (w*, D*); per fit over T steps: T training gradients and about 2T products. Memory: one
    state and one batch; in the fit four states and two trees of hyperparameters.
    """
    gamma = unless_traced(check_fraction, "gamma", gamma)
    if theta is not None:
        theta = unless_traced(check_not_negative, "theta", theta)
    points = check_choice("points", points, ("line", "trajectory"))
    slots = check_choice("slots", slots, ("differentiated", "ignored"))
    sampling = check_choice("sampling", sampling, ("bernoulli", "round"))
    seed = check_seed(seed)
    loop = check_loop(loop)

    def init(inner, lam, window):
        dtype = scalar_dtype(lam)
        nan = jnp.full((), jnp.nan, dtype)
        batch = None if window is None else tree_last(window.train)
        return DistillMemory(
            *fresh_average(inner, lam),
            data=None if window is None else _kept(batch),  # its weight is zero at first
            theta=jnp.full((), 1.0 if theta is None else theta, dtype),
            theta_fit=nan,
            theta_r2=nan,
            theta_cosine=nan,
            status=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
            draws=jnp.zeros((), jnp.int32),
        )

    def distill(memory, batch, keep) -> DistillMemory:
        """`D*_t = SS(D*_{t-1}, p) u SS(D_t, 1 - p)`, and the next draw."""
        n = _slots(batch)
        if not n and not jax.tree.leaves(memory.data):  # nothing to sample from: D*_t = D_t
            return memory
        data = batch if memory.data is None else memory.data
        kept, new = (jax.tree.map(jnp.shape, x) for x in (data, batch))
        if kept != new:
            raise ValueError(
                f"HyperDistill keeps a batch of shapes {kept}, and this one has {new}: within an "
                "episode all batches have one shape. Drop or pad the last partial batch, or make a "
                "new state by init."
            )
        key = jax.random.fold_in(memory.key, memory.draws)
        if sampling == "round":
            rank = jax.random.permutation(key, n)
            old = rank < jnp.floor(n * keep + 0.5)
        else:
            old = jax.random.bernoulli(key, keep, (n,))
        data = jax.tree.map(
            lambda a, b: jnp.where(old.reshape((n,) + (1,) * (jnp.ndim(b) - 1)), a, b), data, batch
        )
        return memory._replace(data=data, draws=optax.safe_increment(memory.draws))

    def product(problem, memory, point, lam, batch, alpha):
        """`v = alpha dPhi(w*, lam; D*)/dlam`."""
        data = memory.data if jax.tree.leaves(memory.data) else batch
        return linearize(problem.dynamics, point, lam, data)[1](alpha)[1]

    def estimate(problem, memory, inner, lam, window):
        batch = tree_last(window)
        memory, point = average(memory, inner, gamma)  # w*_t
        memory = distill(memory, batch.train, 1 - 1 / memory.weight)  # D*_t
        inner = problem.dynamics.step(inner, lam, batch.train)  # s_t
        loss, alpha, direct = outer_gradients(problem, inner, lam, batch.val)
        scaled = tree_scale(memory.theta * memory.weight, alpha)  # v_t is linear in alpha_t
        indirect = product(problem, memory, point, lam, batch.train, scaled)  # theta S_t v_t
        hypergrad = optax.tree.add(direct, indirect)
        info = report(loss, direct, indirect, status=memory.status)
        return Estimate(hypergrad, inner, memory, info)

    def reset(memory, inner, lam):
        w_star, weight = fresh_average(inner, lam)
        return memory._replace(w_star=w_star, weight=weight)

    def backward(problem, consts, carry, x):
        lam, (first, last), alpha_T = consts
        alpha, g, memory, sums = carry
        beta, batch, (rest, model_state, kept) = x
        line = tree_lerp(first, last, beta)  # w^_{t-1}
        at = join(line, rest, model_state)
        alpha, term = linearize(problem.dynamics, at, lam, batch)[1](alpha)
        alpha = without_slots(alpha) if slots == "ignored" else alpha
        g = optax.tree.add(g, term)  # g_s: the indirect term of the last s steps
        weight = gamma * memory.weight + 1  # S_s; the added point is the oldest
        keep = memory.weight / weight  # p_s = S_{s-1} / S_s
        w_star = tree_lerp(tuple(memory.w_star[:2]), line if kept is None else kept, 1 - keep)
        memory = memory._replace(w_star=InnerState(*w_star), weight=weight)
        memory = distill(memory, batch, keep)
        point = join(w_star, rest, model_state)
        v = product(problem, memory, point, lam, batch, alpha_T)
        # x_s = ||v|| S_s and y_s = v.g / ||v||, so that x y and x^2 need no division.
        vg, vv, gg = tree_dot(v, g), tree_dot(v, v), tree_dot(g, g)
        yy, cosine = _ratio(vg**2, vv), _ratio(vg, jnp.sqrt(vv) * jnp.sqrt(gg))
        terms = jnp.stack([weight * vg, weight**2 * vv, yy, cosine]).astype(sums.dtype)
        return (alpha, g, memory, sums + terms), None

    def advance(problem, memory, inner, lam, batch):
        memory, _ = average(memory, inner, gamma)
        memory = distill(memory, batch, 1 - 1 / memory.weight)
        return memory, problem.dynamics.step(inner, lam, batch)

    def fit(problem, memory, inner, lam, window, over_tasks=lambda sums: sums):
        """LinearEstimation (algorithm 4): theta = sum x_s y_s / sum x_s^2 over s = 1..T, and over
        the tasks of a meta-batch.

        The episode is rolled out with lam frozen; its end points span the line
        `w^_{t-1} = (1 - (t-1)/T) w_0 + ((t-1)/T) w_T` on which reverse mode is run.
        """
        steps = check_window(window)
        line = walk(problem, inner, lam, window, points=points, loop=loop)
        consts = (lam, line.ends, line.alpha)
        # D* of the walk is its own: batches of the coming episode may have another size.
        start = reset(memory, inner, lam)._replace(data=_kept(tree_last(window.train)))
        sums = jnp.zeros((4,), memory.theta.dtype)
        carry = (line.alpha, optax.tree.zeros_like(lam), start, sums)
        carry, _ = fold(backward, problem, consts, carry, line.xs, loop=loop, reverse=True)
        _, _, walked, sums = carry
        xy, xx, yy, cosines = over_tasks(sums)
        fitted = _ratio(xy, xx)
        r2 = _ratio(xy * fitted, yy)
        longest = TOLERANCE * steps / walked.weight  # 1.1 T / S_T
        sound = (fitted > 0) & (fitted <= longest) & ((fitted <= 1) | (r2 >= GOOD))
        good = jnp.isfinite(fitted) & (sound | (not theta_guard))
        return memory._replace(
            theta=jnp.where(good, fitted, memory.theta),
            theta_fit=fitted,
            theta_r2=r2,
            theta_cosine=cosines / steps,
            status=jnp.where(good, Status.OK, Status.THETA_REJECTED).astype(jnp.int32),
            draws=walked.draws,
        )

    fit_theta = fit if theta is None else None
    return Estimator(
        init,
        estimate,
        start=fit_theta,
        pools=True,
        reset=reset,
        advance=advance,
        room=Room(_has_no_room, _room, "data"),
        price=lambda size: Cost(2, 1),
        # T + 1 gradients forwards, T gradients and 2 T products on the way back
        start_price=None if fit_theta is None else lambda steps: Cost(2 * steps + 1, 2 * steps),
    )


def _has_no_room(memory: DistillMemory) -> bool:
    return isinstance(memory, DistillMemory) and memory.data is None


def _room(memory: DistillMemory, window: Window) -> DistillMemory:
    """Room for D*, whose weight is zero at first. Another method's memory is left to the checks."""
    if not isinstance(memory, DistillMemory):
        return memory
    fresh = jax.eval_shape(lambda window: _kept(tree_last(window.train)), window)
    if avals(memory.data) == avals(fresh):
        return memory

    def zeros(x):  # of NumPy, which compiles nothing, but has no typed PRNG keys
        return (jnp if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np).zeros(x.shape, x.dtype)

    return memory._replace(data=jax.tree.map(zeros, fresh))


def has_examples(batch: Batch) -> bool:
    """Whether D* can be drawn from such batches (arrays or shapes): a leading axis in common.

    >>> has_examples((jnp.ones((8, 3)), jnp.ones(8))), has_examples((jnp.ones((8, 3)), 0.5))
    (True, False)
    """
    return _slots(batch) > 0


def _kept(batch: Batch) -> Batch:
    """Room for D*: a batch, or () where D* is the current one."""
    return batch if _slots(batch) else ()


def _slots(batch: Any) -> int:
    """Number of examples: the leading length that every leaf shares; 0 if there is none."""
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    return lengths.pop() if len(lengths) == 1 else 0


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, and 0 where b is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
