"""W8 by hand: AdamW on a loss with model state, and its hypergradients as one writes them once.

The state of training is `(w, mu, nu, t, m)`: weights, Adam's moments, its count, model state.
With `U` the update of AdamW as a function of the gradient `g`,

    (q, a_w, a_mu, a_nu, c) = pullback of alpha through U,    h <- h + c + q M
    alpha A = (a_w + q H, a_mu, a_nu),    (q H, q M) = d/deps grad_{w,lam} L(w + eps q)

Model state is a constant: nothing is differentiated through it from step to step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _models import DECAY, EPS, EPS_ROOT, adamw

__all__ = ["begin_run", "by_jax_grad", "one_step", "plain_step", "runs"]

OUTER = optax.adam(0.03)


class Training(NamedTuple):
    w: Any
    mu: Any
    nu: Any
    t: Any
    m: Any


def tree(function, *trees):
    return jax.tree.map(function, *trees)


def begin_run(model):
    """`(training, lam, outer slots)`."""
    zeros, lam = tree(jnp.zeros_like, model.params), model.hyperparams
    s = Training(model.params, zeros, zeros, jnp.int32(0), model.model_state)
    return s, lam, OUTER.init(lam)


def update(g, w, mu, nu, lam, t):
    """AdamW's step number t: `(w, mu, nu)`."""
    b1, b2 = DECAY
    mu = tree(lambda m, g: b1 * m + (1 - b1) * g, mu, g)
    nu = tree(lambda v, g: b2 * v + (1 - b2) * g * g, nu, g)
    c1, c2, decay = 1 - b1**t, 1 - b2**t, jnp.exp(lam["wd"])

    def moved(rate, w, m, v):
        return w - rate * ((m / c1) / (jnp.sqrt(v / c2 + EPS_ROOT) + EPS) + decay * w)

    rates = tree(jnp.exp, lam["lr"])
    w = {k: tree(functools.partial(moved, rates[k]), w[k], mu[k], nu[k]) for k in w}
    return w, mu, nu


def gradient(model, s, lam, batch):
    """`(g, model state after the step, metrics)`."""
    found = jax.value_and_grad(model.train_loss, has_aux=True)(s.w, lam, batch, s.m)
    (value, (m, metrics)), g = found
    return g, m, {"loss": value, **metrics}


def stepped(s, g, m, lam):
    w, mu, nu = update(g, s.w, s.mu, s.nu, lam, s.t + 1)
    return Training(w, mu, nu, s.t + 1, m)


def plain_step(model, s, lam, batch):
    g, m, metrics = gradient(model, s, lam, batch)
    return stepped(s, g, m, lam), metrics


def slope(model, s, lam, batch):
    """`w -> ((dL/dw, dL/dlam), (model state, metrics))`, whose derivative along q is (q H, q M)."""

    def grad(w):
        both = jax.value_and_grad(model.train_loss, (0, 1), has_aux=True)
        (value, (m, metrics)), found = both(w, lam, batch, s.m)
        return found, (m, {"loss": value, **metrics})

    return grad


# -- one step ----------------------------------------------------------------


def one_step(model, carry, train, val):
    """A training step and an outer step: `carry = (training, lam, outer slots)`."""
    s, lam, slots = carry
    # jvp would compute the gradient again, and the compiler finds only a part of it the same
    (g, _), push, (m, metrics) = jax.linearize(slope(model, s, lam, train), s.w, has_aux=True)

    def updated(g, lam):
        new = stepped(s, g, m, lam)
        return new.w, new

    w, pull, new = jax.vjp(updated, g, lam, has_aux=True)
    (value, _), alpha = jax.value_and_grad(model.val_loss, has_aux=True)(w, lam, val, m)
    q, c = pull(alpha)
    h = tree(jnp.add, c, push(q)[1])
    return (new, *outer_step(lam, slots, h)), {"val_loss": value, **metrics}


def outer_step(lam, slots, h):
    updates, slots = OUTER.update(h, slots, lam)
    return optax.apply_updates(lam, updates), slots


# -- reverse ----------------------------------------------------------------


def forward(model, s, lam, batch):
    """A training step, and what the way back needs of it."""
    g, m, metrics = gradient(model, s, lam, batch)
    return stepped(s, g, m, lam), ((s, g), metrics)


def middle(model, s, lam, val):
    """The end of training: `(L_val, (alpha, h))`."""
    (value, _), alpha = jax.value_and_grad(model.val_loss, has_aux=True)(s.w, lam, val, s.m)
    zeros = tree(jnp.zeros_like, s.w)
    return value, ((alpha, zeros, zeros), tree(jnp.zeros_like, lam))


def backward(model, carry, lam, kept, batch):
    """`alpha <- alpha A`, `h <- h + alpha B`."""
    (alpha, h), (s, g) = carry, kept
    pull = jax.vjp(lambda *x: update(*x, s.t + 1), g, s.w, s.mu, s.nu, lam)[1]
    q, a_w, a_mu, a_nu, c = pull(alpha)
    _, (q_hessian, q_mixed), _ = jax.jvp(slope(model, s, lam, batch), (s.w,), (q,), has_aux=True)
    return (tree(jnp.add, a_w, q_hessian), a_mu, a_nu), tree(lambda *x: sum(x), h, c, q_mixed)


# -- the written-out training ----------------------------------------------------------------


def by_jax_grad(model, carry, train, val):
    """`(L_val, h)` after a window of steps of Optax, by `jax.grad` through all of them."""
    s, lam, _ = carry

    def trained(lam):
        w, z, m = s.w, adamw(lam).init(s.w), s.m
        for t in range(jax.tree.leaves(train)[0].shape[0]):
            batch = tree(lambda x, t=t: x[t], train)
            g, (m, _) = jax.grad(model.train_loss, has_aux=True)(w, lam, batch, m)
            m = jax.lax.stop_gradient(m)
            updates, z = adamw(lam).update(g, z, w)
            w = optax.apply_updates(w, updates)
        return model.val_loss(w, lam, tree(lambda x: x[-1], val), m)[0]

    return jax.value_and_grad(trained)(lam)


# -- runs ----------------------------------------------------------------


def runs(model, loop):
    """`{method: run(carry, rows)}`: one episode, rows `(T, batch)` of both data sets.

    One program with scans (`loop="scan"`), or a Python loop around compiled steps (`"host"`),
    because on CPU a convolution inside a compiled loop is slow.
    """
    part, whole = (jax.jit, _itself) if loop == "host" else (_itself, jax.jit)
    go, end, back = (functools.partial(f, model) for f in (forward, middle, backward))

    @part
    def plain_part(const, s, rows):
        lam, (train, _) = const
        return plain_step(model, s, lam, fetched(train, rows))

    @part
    def one_step_part(data, carry, rows):
        return one_step(model, carry, *map(fetched, data, rows))

    @part
    def forward_part(const, s, rows):
        lam, (train, _) = const
        return go(s, lam, fetched(train, rows))

    @part
    def middle_part(const, s, rows):
        lam, (_, val) = const
        return end(s, lam, fetched(val, rows))

    @part
    def backward_part(const, carry, x):
        (lam, (train, _)), (kept, rows) = const, x
        return back(carry, lam, kept, fetched(train, rows)), None

    outer_part = part(outer_step)

    @whole
    def plain(data, carry, rows):
        s, lam, slots = carry
        s, metrics = fold(loop, plain_part, (lam, data), s, rows[0])
        return (s, lam, slots), metrics

    @whole
    def single(data, carry, rows):
        return fold(loop, one_step_part, data, carry, rows)

    @whole
    def through(data, carry, rows):
        s, lam, slots = carry
        const, (train, val) = (lam, data), rows
        s, ys = fold(loop, forward_part, const, s, train)
        value, back = middle_part(const, s, val[-1])
        kept = [y[0] for y in ys] if loop == "host" else ys[0]
        (_, h), _ = fold(loop, backward_part, const, back, (kept, train), reverse=True)
        return (s, *outer_part(lam, slots, h)), (value, h)

    found = {"plain": plain, "one_step": single, "reverse": through}
    return {k: functools.partial(run, (model.train, model.val)) for k, run in found.items()}


def fetched(data, rows):
    return tree(lambda x: x[rows], data)


def fold(loop, body, const, carry, xs, reverse=False):
    """`carry, y = body(const, carry, x)` as a scan, or as a Python loop with a list of ys."""
    if loop == "scan":
        return jax.lax.scan(functools.partial(body, const), carry, xs, reverse=reverse)
    ys = []
    xs = list(zip(*xs, strict=True)) if isinstance(xs, tuple) else list(xs)
    for x in reversed(xs) if reverse else xs:
        carry, y = body(const, carry, x)
        ys.append(y)
    return carry, ys


def _itself(f):
    return f
