"""Hypergradient descent: the learning rate of any Optax optimizer, tuned while it trains.

Baydin, Cornish, Martinez Rubio, Schmidt, Wood (2018), "Online Learning Rate Adaptation with
Hypergradient Descent", ICLR. With g_t = grad f_t(w_{t-1}) and an update that is linear in its
rate, u_t = eta_t d_t and w_t = w_{t-1} + u_t:

    h_t   = g_t . d_{t-1}                        d f_t(w_{t-1}) / d eta_{t-1}
    eta_t = eta_{t-1} - beta h_t                 additive, eqs. (5) and (10)
    eta_t = eta_{t-1} (1 - beta h_t / (|g_t| |d_{t-1}|))           multiplicative, eq. (9)
    d_t   = the inner optimizer's update at rate 1
            -g_t   |   -(g_t + mu v_t), v_t = mu v_{t-1} + g_t   |   -m_t / (sqrt(v_t) + eps)
    w_t   = w_{t-1} + eta_t d_t                  with the new rate; d_0 = 0

No validation set and no second derivative is needed: the next training batch judges the last
step. With d = -g the rate grows where successive gradients agree.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradhpo.core.types import OptState, Params, PyTree
from gradhpo.utils.settings import check_callable, check_number
from gradhpo.utils.validation import leaves_with_names

__all__ = [
    "HypergradientDescentState",
    "Number",
    "Rule",
    "Scope",
    "hypergradient_descent",
]

Rule = Literal["additive", "multiplicative"]
Scope = Literal["global", "leaf", "parameter"]
Number = float | jax.Array


class HypergradientDescentState(NamedTuple):
    """State of `hypergradient_descent`; `optax.tree.get(state, "learning_rate")` finds the rate."""

    learning_rate: PyTree  # eta_t, before any schedule; at least float32
    direction: Params  # d_t (times the schedule): the derivative of the last update in eta
    inner_state: OptState  # slots of the inner optimizer
    rate_state: OptState  # slots of the optimizer that moves eta: empty, or the next level's state
    step: jax.Array  # number of steps taken, int32
    first_bad_step: jax.Array  # the first step, from 0, that found no finite new rate; -1: none


def hypergradient_descent(
    inner: optax.GradientTransformation,
    learning_rate: Number,
    hypergradient_lr: Number | optax.GradientTransformation,
    *,
    rule: Rule = "additive",
    scope: Scope = "global",
    floor: Number | None = None,
    ceiling: Number | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Learn the scale of an optimizer's updates by descent along the training loss.

    Args:
        inner: The optimizer at rate 1, such as `optax.lion(1.0)`: its updates are the
            directions d_t. (With `optax.lion(0.1)` every rate here counts in tenths.)
        learning_rate: eta_0, in the units of the optimizer's usual rate.
        hypergradient_lr: beta. Additive: in units of rate squared per unit of loss, so it
            depends on the scale of the loss; 0 leaves the inner optimizer at `learning_rate`,
            bit for bit. Multiplicative: a fraction below 1. Or an Optax optimizer that moves
            eta given h_t: a number stands for `optax.sgd(beta)`, a chain with `optax.clip`
            bounds the change, and another `sgd_hd` makes beta itself be learned, and so on.
        rule: "additive", or "multiplicative", which takes h_t relative to both norms: without
            units, and unable to change the sign of eta.
        scope: What shares a rate: everything ("global", as in the paper), each array of the
            tree ("leaf") or each number ("parameter"), with its own part of h_t.
        floor, ceiling: Bounds that eta is clipped to. Without a floor the additive rule may
            make eta negative, which it does now and then in the authors' own runs.
        schedule: `s(count)`, count from 0: the update is `s eta_t d_t`. The paper's
            1 / sqrt(t) is `lambda count: (count + 1) ** -0.5`.

    Returns:
        An Optax transformation with state `HypergradientDescentState`. Beyond the inner
        optimizer it costs one product of two trees like the parameters (three for the
        multiplicative rule) and stores one such tree. Rates and products are float32, or
        float64 for float64 parameters; updates keep their dtype.

        h_t is the derivative of the loss when the transformation receives its gradient and its
        own updates are applied unchanged. A gradient clipped to a norm before it scales h_t by
        the same factor; scaling by c after it makes the true derivative c h_t.

        Where a new rate is not finite, all rates and rate_state keep their values and
        `first_bad_step` says when. The update itself is passed on as the inner optimizer made
        it; `optax.apply_if_finite` around everything keeps it from the weights.

    Raises:
        TypeError: `inner` is no optimizer, a number is something else, or (in `init`) a leaf of
            the parameters is not real floating point.
        ValueError: a number out of range, or an unknown rule or scope.

    Source:
        Baydin et al. (2018), section 3; the learned beta is the stack of Chandra, Xie,
        Ragan-Kelley, Meijer (2022), "Gradient Descent: The Ultimate Optimizer", with
        h_t (-h_{t-1}) for its hypergradient. The authors' Adam moves eta array after array
        within a step, so that early arrays use a rate that has not met all of h_t yet; here h_t
        is summed first.

    >>> opt = hypergradient_descent(optax.sgd(1.0), learning_rate=0.1, hypergradient_lr=0.01)
    >>> w = jnp.array([1.0, 2.0])
    >>> state = opt.init(w)
    >>> for _ in range(2):
    ...     updates, state = opt.update(w, state)  # f(w) = w . w / 2
    ...     w = optax.apply_updates(w, updates)
    >>> print(state.learning_rate)  # 0.1 + 0.01 * (0.9 + 3.6)
    0.145
    """
    for name, choice, known in (("rule", rule, Rule), ("scope", scope, Scope)):
        if choice not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {choice!r}.")
    inner = optax.with_extra_args_support(_optimizer("inner", inner))
    multiplicative = rule == "multiplicative"
    _check_start(learning_rate, floor, ceiling, multiplicative)
    mover = _rate_optimizer(hypergradient_lr, multiplicative)
    if schedule is not None:
        check_callable("schedule", schedule, "(count) -> factor")

    def init(params):
        _check_real(params)
        rate = _initial_rate(learning_rate, params, scope)
        return HypergradientDescentState(
            learning_rate=rate,
            direction=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.result_type(p)), params),
            inner_state=inner.init(params),
            rate_state=mover.init(rate),
            step=jnp.zeros((), jnp.int32),
            first_bad_step=jnp.full((), -1, jnp.int32),
        )

    def move(rate, rate_state, g, d):
        """eta_t, its optimizer's slots, and whether eta_t is finite (if not, the old ones)."""
        h = _products(g, d, rate, scope)
        if multiplicative:
            squares = _products(g, g, rate, scope), _products(d, d, rate, scope)
            h = jax.tree.map(lambda x, gg, dd: x / _root(gg) / _root(dd), h, *squares)
        change, slots = mover.update(h, rate_state, rate)
        if multiplicative:
            change = jax.tree.map(jnp.multiply, rate, change)
        new = optax.apply_updates(rate, change)
        finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]).all()
        keep = partial(jnp.where, finite)
        new, slots = jax.tree.map(keep, (new, slots), (rate, rate_state))
        if floor is not None or ceiling is not None:
            new = jax.tree.map(lambda x: jnp.clip(x, floor, ceiling).astype(x.dtype), new)
        return new, slots, finite

    def update(updates, state, params=None, **extra_args):
        rate, rate_state, finite = move(
            state.learning_rate, state.rate_state, updates, state.direction
        )
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        sizes = jax.tree.map(lambda _: rate, direction) if scope == "global" else rate
        derivative = direction
        if schedule is not None:
            s = schedule(state.step)
            sizes = jax.tree.map(lambda r: (s * r).astype(r.dtype), sizes)
            derivative = jax.tree.map(lambda d: (s * d).astype(d.dtype), direction)
        # Rounded to the leaf's dtype before the product, as Optax does.
        scaled = jax.tree.map(lambda r, d: r.astype(d.dtype) * d, sizes, direction)
        first_bad = jnp.logical_not(finite) & (state.first_bad_step < 0)
        return scaled, HypergradientDescentState(
            learning_rate=rate,
            # The choice keeps a bad d_t out of the next h, and makes d_t wait for h_t: without it
            # XLA copies d_{t-1} to write d_t before d_{t-1} has been read.
            direction=jax.tree.map(
                lambda d, old: jnp.where(finite, d.astype(old.dtype), old),
                derivative,
                state.direction,
            ),
            inner_state=inner_state,
            rate_state=rate_state,
            step=jnp.asarray(optax.safe_increment(state.step)),
            first_bad_step=jnp.where(first_bad, state.step, state.first_bad_step),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _products(a: Params, b: Params, rate: PyTree, scope: Scope) -> PyTree:
    """The inner product of two trees over what shares a rate, shaped like `rate`."""

    def product(x, y, r):
        return x.astype(r.dtype) * y.astype(r.dtype)

    if scope == "parameter":
        return jax.tree.map(product, a, b, rate)
    # Sums of products, not dots: they fuse, and an array split over devices stays where it is.
    if scope == "leaf":
        return jax.tree.map(lambda x, y, r: jnp.sum(product(x, y, r)), a, b, rate)
    sums = jax.tree.map(lambda x, y: jnp.sum(product(x, y, rate)), a, b)
    return jnp.asarray(sum(jax.tree.leaves(sums)), rate.dtype)  # 0 where a group is empty


def _root(square: jax.Array) -> jax.Array:
    """A norm to divide by: 1 where it is 0, so that d_0 = 0 has a quotient and a derivative."""
    return jnp.sqrt(jnp.where(square == 0, 1, square))


def _initial_rate(learning_rate: Number, params: Params, scope: Scope) -> PyTree:
    """eta_0 for everything that has a rate, never narrower than float32."""

    def full(shape, *leaves):
        dtype = jnp.result_type(jnp.float32, *(jnp.result_type(x) for x in leaves))
        return jnp.full(shape, learning_rate, dtype)

    if scope == "global":
        return full((), *jax.tree.leaves(params))
    return jax.tree.map(lambda p: full(jnp.shape(p) if scope == "parameter" else (), p), params)


def _rate_optimizer(hypergradient_lr: Any, multiplicative: bool) -> optax.GradientTransformation:
    """What moves eta along its gradient: the optimizer given, or plain steps of size beta."""
    if hasattr(hypergradient_lr, "init") or callable(hypergradient_lr):
        return _optimizer("hypergradient_lr", hypergradient_lr)
    if not isinstance(hypergradient_lr, Tracer):
        beta = check_number("hypergradient_lr", hypergradient_lr)
        if beta < 0:
            raise ValueError(f"hypergradient_lr must not be negative, got {beta}.")
        if multiplicative and beta >= 1:
            raise ValueError(
                f"with the multiplicative rule hypergradient_lr must be below 1, got {beta}: eta "
                "changes by a factor between 1 - beta and 1 + beta. Try 0.02."
            )
    return optax.sgd(hypergradient_lr)


def _optimizer(name: str, value: Any) -> optax.GradientTransformation:
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name} must be an Optax optimizer, such as optax.sgd(1.0)"
            f"{' or a number' * (name != 'inner')}; got {value!r} ({type(value).__name__})."
        )
    return value


def _check_start(learning_rate: Any, floor: Any, ceiling: Any, multiplicative: bool) -> None:
    """Raise unless eta_0 is a number within its bounds; a traced value is not checked."""
    if callable(learning_rate):
        raise TypeError(
            "learning_rate is where the rate starts, a number; a schedule multiplies it: pass it "
            "as schedule=."
        )
    given = {"learning_rate": learning_rate, "floor": floor, "ceiling": ceiling}
    known = {
        name: check_number(name, value)
        for name, value in given.items()
        if not (isinstance(value, Tracer) or (value is None and name != "learning_rate"))
    }
    if "learning_rate" not in known:
        return
    start = known["learning_rate"]
    if start < 0 or (multiplicative and start == 0):
        rule = "positive, as the multiplicative rule cannot leave 0" if start == 0 else "at least 0"
        raise ValueError(f"learning_rate must be {rule}; got {start}.")
    if not known.get("floor", -np.inf) <= start <= known.get("ceiling", np.inf):
        raise ValueError(f"learning_rate must lie between floor and ceiling; got {known}.")


def _check_real(params: Params) -> None:
    for name, leaf in leaves_with_names(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        remedy = "leave it out with optax.masked"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = "wrap the optimizer in optax.contrib.split_real_and_imaginary"
        raise TypeError(
            f"every parameter must be real floating point, but leaf {name} is {dtype}; {remedy}."
        )
