"""Reverse mode along a training run that is run backwards, exactly (reversible learning).

Maclaurin, Duvenaud & Adams (2015), "Gradient-based Hyperparameter Optimization through
Reversible Learning", algorithms 1 to 3. SGD with momentum on scaled integers, t = 0..T-1:

    g_t = dL_train(w_t, lam; D_t)/dw
    v_{t+1} = mu_t v_t - (1 - mu_t) g_t          what mu_t v_t forgets goes to a buffer
    w_{t+1} = w_t + eta_t v_{t+1}

and back, from nothing but w_T, v_T and the buffer,

    w_t = w_{t+1} - eta_t v_{t+1}
    g_t = dL_train(w_t, lam; D_t)/dw             the same bits, at the recovered point
    v_t = (v_{t+1} + (1 - mu_t) g_t) / mu_t      with what the buffer kept

    d eta_t = dw . v_{t+1},   dv <- dv + eta_t dw
    d mu_t = dv . (v_t + g_t),   q = -(1 - mu_t) dv
    dw <- dw + q H_t,   dlam <- dlam + q M_t + (d eta_t, d mu_t) d(eta_t, mu_t)/dlam
    dv <- mu_t dv

The last block is `linearize` at the recovered state. (Algorithm 2 prints some of its lines at
the wrong index: the gradient, the products and d mu_t belong to the recovered w_t and v_t.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from gradhpo.core import losses
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
)
from gradhpo.core.problem import BilevelProblem, Window, outer_gradients
from gradhpo.core.start import pull_start
from gradhpo.core.status import Status
from gradhpo.core.types import Batch, Hyper, PyTree, Scalar
from gradhpo.utils._partition import merge, split
from gradhpo.utils.exact_arithmetic import (
    DENOMINATOR,
    Buffer,
    Number,
    add,
    allocated_bits,
    decay,
    decode,
    empty_buffer,
    encode,
    in_range,
    is_empty,
    numerator,
    plan,
    same,
    subtract,
    undo_decay,
    used_bits,
    worst_bits,
)
from gradhpo.utils.gradients import tree_broadcast, tree_l2_norm, tree_last, tree_where
from gradhpo.utils.settings import check_count, check_number

__all__ = ["Reversed", "reversible", "reversible_gradients"]


class Reversed(NamedTuple):
    """Derivatives by reversal, and whether training was indeed reversed."""

    gradients: Unrolled  # NaN unless `status` is OK
    status: Scalar  # int32: OK, NOT_REVERSED, OUT_OF_RANGE or BUFFER_TOO_SMALL
    used_bits: Scalar  # information that the fullest entry's buffer held
    allocated_bits: Scalar  # per parameter, of the largest buffer


def reversible(
    unroll_steps: int, *, least_momentum: float | None = None, loop: Loop = "scan"
) -> Estimator:
    """The exact derivative of the validation loss, from a run that is stored nowhere.

    The dynamics must be `from_optax(train_loss, lam -> reversible_sgd(…))`.

    Args:
        unroll_steps: Horizon T.
        least_momentum: What the buffers are sized for: no momentum of the window is below it,
            at least in the geometric mean. Needed where a momentum is a hyperparameter;
            taken from the momenta where they are known at compile time.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Exact as `reverse` is, for training on numbers rounded to 2^-52 (64-bit mode of JAX; equal
    to float64 training to about T 2^-52) or to 2^-20. Weights, velocities and their changes
    must stay below 1024.

    Cost per outer update: T training gradients forwards; 2 T gradients and T second-order
    products backwards; one validation gradient. Memory beside one step: two integers a
    parameter, and T log2(1 / mu) + log2(1 / (1 - mu)) bits, in steps of 16, at least 32; and T
    model states where there is one, for statistics cannot be run backwards.

    `info`: `buffer_bits`, the most that was used of `buffer_allocated`, bits per parameter;
    `alpha_growth` as in `reverse`. At the end w_0 and v_0 are compared bit for bit with what
    they were, and the buffer with zero; otherwise the hypergradient is NaN, and the status of
    the step says why (`NOT_REVERSED`, `OUT_OF_RANGE`, `BUFFER_TOO_SMALL`).
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    least_momentum = _checked(least_momentum)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ()

    def estimate(problem, state, inner, lam, window, origin=None):
        got = reversible_gradients(
            problem, inner, lam, window, least_momentum=least_momentum, loop=loop
        )
        found = got.gradients
        indirect = optax.tree.add(found.indirect, pull_start(problem, origin, lam, found.initial))
        info = report(
            found.val_loss,
            found.direct,
            indirect,
            alpha_growth=found.growth,
            buffer_bits=got.used_bits,
            buffer_allocated=got.allocated_bits,
            status=got.status,
        )
        hypergrad = optax.tree.add(found.direct, indirect)
        return Estimate(hypergrad, found.inner, state, info)

    metrics = ("alpha_growth", "buffer_bits", "buffer_allocated")
    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        metrics=metrics,
        starts=True,
        price=lambda size: Cost(3 * unroll_steps + 1, unroll_steps),
    )


def reversible_gradients(
    problem: BilevelProblem,
    inner: InnerState,
    lam: Hyper,
    window: Window,
    *,
    least_momentum: float | None = None,
    loop: Loop = "scan",
) -> Reversed:
    """What `reversible` is made of, with the derivatives by the initial weights and velocity.

    Args:
        problem: Dynamics of `from_optax(train_loss, lam -> reversible_sgd(…))`, and the
            validation loss.
        inner: s_0 = (w_0, v_0); rounded to scaled integers (`gradhpo.utils.exact_arithmetic`).
        lam: Hyperparameters.
        window: T train batches and T validation batches, of which the last one counts.
        least_momentum, loop: As in `reversible`.

    Raises:
        ValueError: other dynamics; `least_momentum` outside (0, 1), or missing where the
            momenta are not known at compile time.

    >>> from gradhpo import from_optax
    >>> from gradhpo.transforms import reversible_sgd
    >>> loss = lambda w, lam, batch: (w - batch) ** 2 / 2
    >>> dynamics = from_optax(loss, lambda lam: reversible_sgd(lam, momentum=0.5))
    >>> problem, lam = BilevelProblem(dynamics, loss), jnp.array(0.5)
    >>> inner = dynamics.init(jnp.array(0.0), lam)
    >>> got = reversible_gradients(problem, inner, lam, Window(jnp.ones(2), jnp.ones(2)))
    >>> found = got.gradients  # w_2 = 1 - (1 - lam / 2)^2 + lam / 4
    >>> print(found.inner.params, found.indirect, found.initial.params, int(got.status))
    0.5625 -0.4375 -0.1914... 0
    """
    least_momentum = _checked(least_momentum)
    steps = count_steps(window.train)
    bits = _bits(problem, lam, inner, steps, least_momentum)
    rates, constant, fits = _rates(problem, lam, inner, steps)
    plans = jax.vmap(plan)(_smallest(rates, constant, steps))
    w, v = _leaves(inner.params), _leaves(inner.opt_state.velocity)
    fits &= _all(in_range(x) for x in w + v)
    start = [
        Cell(encode(w), encode(v), empty_buffer(w.shape, size))
        for w, v, size in zip(w, v, bits, strict=True)
    ]
    consts = lam, inner, constant
    xs = window.train, rates, (plans.spill.T, plans.plane.T)
    carry = start, fits, inner.model_state
    (cells, fits, model_state), states = fold(_step, problem, consts, carry, xs, loop=loop)
    used = jnp.max(
        jnp.stack([used_bits(c.buffer, n) for c, n in zip(cells, plans.planes, strict=True)])
    )

    last = _state(inner, cells, model_state, steps)
    loss, alpha, direct = outer_gradients(problem, last, lam, tree_last(window.val))
    size = tree_l2_norm(alpha)
    carry = cells, alpha, optax.tree.zeros_like(lam), size
    xs = jnp.arange(steps, dtype=jnp.int32), states, *xs
    carry, _ = fold(_step_back, problem, consts, carry, xs, loop=loop, reverse=True)
    cells, initial, indirect, largest = carry

    room = _all(
        n <= max(c.buffer.planes.shape[0] - 1, 0) for c, n in zip(cells, plans.planes, strict=True)
    )
    back = _all(
        same(c.w, s.w) & same(c.v, s.v) & is_empty(c.buffer)
        for c, s in zip(cells, start, strict=True)
    )
    status = jnp.where(back, Status.OK, Status.NOT_REVERSED)
    status = jnp.where(room, status, Status.BUFFER_TOO_SMALL)
    status = jnp.where(fits, status, Status.OUT_OF_RANGE).astype(jnp.int32)
    exact = status == Status.OK
    growth = largest / jnp.where(size == 0, 1.0, size)
    direct, indirect, initial = _or_nan(exact, (direct, indirect, initial))
    gradients = Unrolled(loss, direct, indirect, initial, _or_nan(fits, last), growth)
    allocated = max((allocated_bits(c.buffer) for c in start), default=0)
    return Reversed(gradients, status, used, jnp.asarray(allocated, used.dtype))


# -- one step, there and back ------------------------------------------------------------------


class Cell(NamedTuple):
    """One leaf of the parameters: weights and velocities as scaled integers, and their buffer."""

    w: Number
    v: Number
    buffer: Buffer


class Rates(NamedTuple):
    """Per leaf of the parameters; None for the half that the other instance has."""

    eta: list[jax.Array] | None
    n: list[jax.Array] | None  # mu = n / d


def _step(problem, consts, carry, x):
    lam, inner, constant = consts
    cells, fits, model_state = carry
    batch, rates, (spill, plane) = x
    gradient, after = _gradient(problem, lam, _state(inner, cells, model_state), batch)
    rows = zip(cells, gradient, _each(rates, constant), strict=True)
    new = []
    for i, (cell, g, (eta, n)) in enumerate(rows):
        v, buffer = decay(cell.v, cell.buffer, n, spill[i], plane[i])
        kick = _kick(n, g)
        v = add(v, encode(kick))
        move = _move(eta, v)
        w = add(cell.w, encode(move))
        fits &= _all(in_range(x) for x in (kick, move, _wide(v), _wide(w)))
        new.append(Cell(w, v, buffer))
    return (lax.optimization_barrier(new), fits, after), model_state


def _step_back(problem, consts, carry, x):
    lam, inner, constant = consts
    cells, alpha, acc, largest = carry
    t, model_state, batch, rates, (spill, plane) = x
    etas, n = zip(*_each(rates, constant), strict=True)
    cells = [
        c._replace(w=subtract(c.w, encode(_move(eta, c.v))))
        for c, eta in zip(cells, etas, strict=True)
    ]
    gradient, _ = _gradient(problem, lam, _state(inner, cells, model_state), batch)
    for i, (cell, g) in enumerate(zip(cells, gradient, strict=True)):
        before = subtract(cell.v, encode(_kick(n[i], g)))
        cells[i] = Cell(cell.w, *undo_decay(before, cell.buffer, n[i], spill[i], plane[i]))
    cells = lax.optimization_barrier(cells)
    _, pullback = linearize(problem.dynamics, _state(inner, cells, model_state, t), lam, batch)
    alpha, term = pullback(alpha)
    largest = jnp.maximum(largest, tree_l2_norm(alpha).astype(largest.dtype))
    return (cells, alpha, optax.tree.add(acc, term), largest), None


def _gradient(
    problem: BilevelProblem, lam: Hyper, state: InnerState, batch: Batch
) -> tuple[list[jax.Array], PyTree]:
    """`g_t`, leaf by leaf, to the bit the same in both passes; and the model state after it.

    The barriers make it an island: no operation inside is shared or fused with what stands
    around it, which differs between the passes. In particular the second-order product at the
    same point has its own gradient.
    """
    w, rest = split(state.params)
    w, lam, batch, model_state = _barrier((w, lam, batch, state.model_state))

    def evaluate(w):
        loss = problem.dynamics.parts.train_loss  # type: ignore[union-attr]
        got = losses.train(loss, merge(w, rest), lam, batch, model_state)
        return got.value, got.model_state

    g, model_state = jax.grad(evaluate, has_aux=True)(w)
    return lax.optimization_barrier(jax.tree.leaves(g)), model_state


def _kick(n: jax.Array, g: jax.Array) -> jax.Array:
    """`-(1 - mu) g`."""
    wide = jnp.result_type(float)
    return (n.astype(wide) / DENOMINATOR - 1) * g.astype(wide)


def _move(eta: jax.Array, v: Number) -> jax.Array:
    """`eta v`."""
    return eta * _wide(v)


def _wide(number: Number) -> jax.Array:
    return decode(number, jnp.result_type(float))


def _state(
    inner: InnerState, cells: list[Cell], model_state: PyTree, taken: jax.typing.ArrayLike = 0
) -> InnerState:
    """The state as the losses know it, `taken` steps after s_0 = inner."""
    w, rest = split(inner.params)
    leaves, structure = jax.tree.flatten(w)
    pairs = list(zip(cells, leaves, strict=True))
    slots = inner.opt_state._replace(
        step=inner.opt_state.step + jnp.asarray(taken, inner.opt_state.step.dtype),
        velocity=structure.unflatten([decode(c.v, jnp.result_type(x)) for c, x in pairs]),
    )
    w = structure.unflatten([decode(c.w, jnp.result_type(x)) for c, x in pairs])
    return InnerState(merge(w, rest), slots, model_state)


def _barrier(tree: PyTree) -> PyTree:
    """`lax.optimization_barrier` on the leaves it knows: PRNG keys are let through."""

    def is_key(x):
        return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)

    leaves, structure = jax.tree.flatten(tree)
    arrays = iter(lax.optimization_barrier([x for x in leaves if not is_key(x)]))
    return structure.unflatten([x if is_key(x) else next(arrays) for x in leaves])


# -- rates -----------------------------------------------------------------------------------
# They are evaluated once, not in each pass, so that both see the same bits.


def _rates(
    problem: BilevelProblem, lam: Hyper, inner: InnerState, steps: int
) -> tuple[Rates, Rates, jax.Array]:
    """`(varying, constant, valid)`: schedules, tabulated with leading axis T, and the others.

    `valid` says whether every momentum lies in (0, 1).
    """
    optimizer = _optimizer(problem, lam)
    wide = jnp.result_type(float)
    eta, eta_varies = _tabulate(optimizer.learning_rate, inner, steps)
    mu, mu_varies = _tabulate(optimizer.momentum, inner, steps)
    eta = [jnp.asarray(x, wide) for x in eta]
    n = [numerator(x) for x in mu]
    varying = Rates(eta if eta_varies else None, n if mu_varies else None)
    constant = Rates(None if eta_varies else eta, None if mu_varies else n)
    return varying, constant, _all(jnp.all((x > 0) & (x < 1)) for x in mu)


def _tabulate(rate: PyTree, inner: InnerState, steps: int) -> tuple[list[jax.Array], bool]:
    params = split(inner.params)[0]

    def leaves(rate):
        return [jnp.asarray(x) for x in jax.tree.leaves(tree_broadcast(rate, params))]

    if not callable(rate):
        return leaves(rate), False
    counts = inner.opt_state.step + jnp.arange(steps, dtype=jnp.int32)
    return jax.vmap(lambda count: leaves(rate(count)))(counts), True


def _each(varying: Rates, constant: Rates) -> Any:
    """`(eta, n)` of every leaf at one step."""
    return zip(varying.eta or constant.eta or (), varying.n or constant.n or (), strict=True)


def _smallest(varying: Rates, constant: Rates, steps: int) -> jax.Array:
    """The smallest n of every leaf and step, (leaves, T): the one that needs most room."""
    if varying.n is not None:
        return jnp.stack([n.reshape(steps, -1).min(1) for n in varying.n])
    return jnp.stack([jnp.full(steps, jnp.min(n)) for n in constant.n or ()])


def _bits(
    problem: BilevelProblem, lam: Hyper, inner: InnerState, steps: int, least: float | None
) -> list[float]:
    """Bits per entry that the buffer of every leaf may need."""
    if least is not None:
        return [worst_bits(np.full(steps, least))] * len(_leaves(inner.params))
    with jax.ensure_compile_time_eval():
        varying, constant, _ = _rates(problem, lam, inner, steps)
        smallest = _smallest(varying, constant, steps)
    if isinstance(smallest, Tracer):
        raise ValueError(
            "reversible learning sizes its buffers by the momenta of the window, but here they are "
            "known only when the program runs: give least_momentum=, below which no momentum "
            "falls (0.5 takes one bit per parameter and step, 0.9 a seventh of that)."
        )
    return [worst_bits(n / DENOMINATOR) for n in np.asarray(smallest)]


# -- small things ----------------------------------------------------------------------------


def _leaves(tree: PyTree) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(split(tree)[0])]


def _all(conditions) -> jax.Array:
    return jnp.all(jnp.stack([jnp.asarray(True), *conditions]))


def _or_nan(good: jax.Array, tree: PyTree) -> PyTree:
    floating, rest = split(tree)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), floating)
    return merge(tree_where(good, floating, nan), rest)


def _checked(least_momentum: float | None) -> float | None:
    if least_momentum is None:
        return None
    least_momentum = check_number("least_momentum", least_momentum)
    if not 0 < least_momentum < 1:
        raise ValueError(f"least_momentum must lie strictly between 0 and 1, got {least_momentum}.")
    return least_momentum


def _optimizer(problem: BilevelProblem, lam: Hyper) -> Any:
    """The inner optimizer, which must show its rates."""
    parts = problem.dynamics.parts
    optimizer = None if parts is None else parts.make_optimizer(lam)
    if not hasattr(optimizer, "learning_rate") or not hasattr(optimizer, "momentum"):
        raise ValueError(
            "reversible learning runs one inner optimizer backwards, SGD with momentum in the form "
            "of gradhpo.transforms.reversible_sgd: give inner_optimizer=lambda lam: "
            "reversible_sgd(learning_rate, momentum), or take reverse(memory='segments')."
        )
    return optimizer
