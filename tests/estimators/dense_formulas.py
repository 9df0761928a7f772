"""Every method's formula, written down with dense Jacobians of the flattened step.

Nothing here uses the library's own products: A_t and B_t are matrices, sums are sums.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gradhpo import BilevelProblem, InnerState, Window
from gradhpo.core.losses import loss_value
from gradhpo.utils._partition import merge, split


class Case(NamedTuple):
    """What an estimator is called with beside its memory."""

    problem: BilevelProblem
    inner: InnerState
    lam: Any
    window: Window


def started(problem_at, steps):
    """The start of an episode of a problem of the zoo, and its data."""
    task = problem_at(steps)
    inner, window = task.begin(steps)
    return Case(task.problem, inner, task.hyperparams, window)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def flat_state(inner):
    return ravel_pytree(split((inner.params, inner.opt_state))[0])[0]


def with_flat(inner, s):
    """The state `inner` with its floating leaves replaced by the vector s."""
    floating, rest = split((inner.params, inner.opt_state))
    return InnerState(*merge(ravel_pytree(floating)[1](s), rest), inner.model_state)


@partial(jax.jit, static_argnums=0)
def jacobians(problem, inner, lam, batch):
    """(A, B): dense, by reverse mode through the step as a whole."""
    lam, unravel = ravel_pytree(lam)

    def step(s, lam):
        return flat_state(problem.dynamics.step(with_flat(inner, s), unravel(lam), batch))

    return jax.jacobian(step, argnums=(0, 1))(flat_state(inner), lam)


@partial(jax.jit, static_argnums=0)
def outer(problem, inner, lam, batch):
    """(alpha over the whole state, direct), flat."""
    lam, unravel = ravel_pytree(lam)

    def loss(s, lam):
        weights = with_flat(inner, s).params
        return loss_value(problem.outer_loss, weights, unravel(lam), batch, inner.model_state)

    return jax.grad(loss, argnums=(0, 1))(flat_state(inner), lam)


@partial(jax.jit, static_argnums=0)
def step(problem, inner, lam, batch):
    return problem.dynamics.step(inner, lam, batch)


class Dense(NamedTuple):
    """Everything along one trajectory; entry t - 1 belongs to step t."""

    problem: object
    lam: object
    window: object
    states: list  # s_0 .. s_T
    A: list
    B: list
    alpha: list
    direct: list

    @classmethod
    def of(cls, problem, inner, lam, window):
        steps = jax.tree.leaves(window.train)[0].shape[0]
        states, A, B, alpha, direct = [inner], [], [], [], []
        for t in range(steps):
            a, b = jacobians(problem, states[-1], lam, at(window.train, t))
            states.append(step(problem, states[-1], lam, at(window.train, t)))
            al, d = outer(problem, states[-1], lam, at(window.val, t))
            for seq, x in zip((A, B, alpha, direct), (a, b, al, d), strict=True):
                seq.append(x)
        return cls(problem, lam, window, states, A, B, alpha, direct)

    @property
    def T(self):
        return len(self.A)

    def tree(self, flat):
        return ravel_pytree(self.lam)[1](flat)

    def one_step(self, t):
        return self.direct[t - 1] + self.alpha[t - 1] @ self.B[t - 1]

    def greedy(self, gamma):
        terms = (gamma ** (self.T - t) * self.alpha[t - 1] @ self.B[t - 1] for t in self.steps())
        return self.direct[-1] + sum(terms)

    def discounted_sum(self, gamma):
        """Eq. (7) of Lee et al.: the true alpha_T, A_t replaced by gamma I."""
        terms = (gamma ** (self.T - t) * self.alpha[-1] @ self.B[t - 1] for t in self.steps())
        return self.direct[-1] + sum(terms)

    def reverse(self):
        """Equation (1)."""
        total, alpha = self.direct[-1], self.alpha[-1]
        for t in reversed(self.steps()):
            total, alpha = total + alpha @ self.B[t - 1], alpha @ self.A[t - 1]
        return total

    def steps(self):
        return range(1, self.T + 1)

    def weight(self, gamma, t):
        return sum(gamma**i for i in range(t))

    def averaged_point(self, gamma, t):
        """w*_t = sum_i gamma^(t-i) s_{i-1} / S_t, discrete leaves those of s_{t-1}."""
        s = sum(gamma ** (t - i) * flat_state(self.states[i - 1]) for i in range(1, t + 1))
        return with_flat(self.states[t - 1], s / self.weight(gamma, t))

    def averaged_product(self, gamma, t, data=None):
        """alpha_t dPhi/dlam at (w*_t, D*_t)."""
        data = at(self.window.train, t - 1) if data is None else data
        point = self.averaged_point(gamma, t)
        return self.alpha[t - 1] @ jacobians(self.problem, point, self.lam, data)[1]

    def averaged_one_step(self, gamma, t):
        return self.direct[t - 1] + self.averaged_product(gamma, t)

    def hyperdistill(self, gamma, theta, t, data=None):
        product = self.averaged_product(gamma, t, data)
        return self.direct[t - 1] + theta * self.weight(gamma, t) * product

    def linear_estimation(self, gamma, points, normalised):
        """theta by algorithm 4, D*_s = D_{T-s+1}: for batches that are equal or have no slots."""
        T, first, last = self.T, flat_state(self.states[0]), flat_state(self.states[-1])
        line = [(1 - (t - 1) / T) * first + (t - 1) / T * last for t in self.steps()]
        true = [flat_state(s) for s in self.states[:-1]]
        averaged = {"line": line, "trajectory": true}[points]
        g, alpha, xy, xx = 0.0, self.alpha[-1], 0.0, 0.0
        for s in self.steps():
            t = T - s + 1
            batch = at(self.window.train, t - 1)
            A, B = jacobians(
                self.problem, with_flat(self.states[t - 1], line[t - 1]), self.lam, batch
            )
            g, alpha = g + alpha @ B, alpha @ A
            # The oldest of the last s points has weight gamma^(s-1): newest first here.
            S = self.weight(gamma, s)
            w_star = sum(gamma ** (j - 1) * averaged[T - j] for j in range(1, s + 1)) / S
            point = with_flat(self.states[t - 1], w_star)
            v = self.alpha[-1] @ jacobians(self.problem, point, self.lam, batch)[1]
            if normalised:
                x = jnp.linalg.norm(v) * S
                y = (v / jnp.linalg.norm(v)) @ g
                xy, xx = xy + x * y, xx + x * x
            else:  # the same sums with the norm cancelled
                xy, xx = xy + S * (v @ g), xx + S * S * (v @ v)
        return xy / xx


@cache
def written_out(problem_at, steps):
    """A problem and its formulas, kept: tests that share it also share what is compiled for it.

    For float64 alone: the numbers are those of the first call's default.
    """
    case = started(problem_at, steps)
    return case, Dense.of(*case)


def equal_batches(problem_at, steps):
    """The problem with one train batch used at every step: D* is that batch."""
    problem, inner, lam, window = started(problem_at, steps)
    train = jax.tree.map(lambda x: jnp.repeat(x[:1], steps, axis=0), window.train)
    return problem, inner, lam, window._replace(train=train)


def without_slots(problem_at, steps):
    """The problem with a number beside its batch, so that there is no example axis."""
    problem, inner, lam, window = started(problem_at, steps)
    dynamics = problem.dynamics
    dynamics = dynamics._replace(
        step=lambda s, lam, b: problem.dynamics.step(s, lam, b[0]), parts=None
    )
    window = window._replace(train=(window.train, jnp.arange(steps)))
    return problem._replace(dynamics=dynamics), inner, lam, window


def episode(estimator, problem, memory, inner, lam, window):
    """Estimates after every step, lam held fixed."""
    windows = jax.tree.map(lambda x: x[:, None], window)
    estimate = jax.jit(partial(estimator.estimate, problem))
    seen = []
    for t in range(jax.tree.leaves(window.train)[0].shape[0]):
        got = estimate(memory, inner, lam, at(windows, t))
        memory, inner = got.memory, got.inner
        seen.append(got)
    return seen


def whole_window(estimator, problem, inner, lam, window):
    """The estimate over the window as one outer update."""
    memory = estimator.init(inner, lam, window)
    return jax.jit(partial(estimator.estimate, problem))(memory, inner, lam, window)


def every_step(estimator, problem, inner, lam, window):
    """The estimates of a window-1 method after every step of one episode, lam held fixed."""
    windows = jax.tree.map(lambda x: x[:, None], window)
    memory = estimator.init(inner, lam, at(windows, 0))
    estimate = jax.jit(partial(estimator.estimate, problem))
    seen = []
    for t in range(jax.tree.leaves(window.train)[0].shape[0]):
        got = estimate(memory, inner, lam, at(windows, t))
        memory, inner = got.memory, got.inner
        seen.append(got)
    return seen
