"""Evolution strategies: hypergradients from values of the validation loss alone.

ES, with antithetic pairs eps ~ N(0, sigma^2 I), for F(lam) the validation loss after a
window of training with lam:

    h = mean_i eps_i (F(lam + eps_i) - F(lam - eps_i)) / (2 sigma^2)

unbiased for the gradient of F smoothed by that noise, exact in expectation where F is
quadratic. What happened before the window counts as a constant. PES (Vicol et al. 2021,
algorithm 2) undoes that: every particle keeps its two states and the sum xi of all its
perturbations since the episode began, and

    h = mean_i xi_i (F_i(lam + eps_i) - F_i(lam - eps_i)) / (2 sigma^2),  xi_i <- xi_i + eps_i

is unbiased for the derivative through the whole episode so far. No derivative is taken
anywhere: a check of everything else, and the honest choice where nothing can be
differentiated. The variance grows with the number of hyperparameters and, for PES, with
the number of windows since the episode began.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, report, roll
from gradhpo.core.losses import loss_value
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.start import begin_episode
from gradhpo.core.step import strengthen
from gradhpo.core.types import Hyper
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import tree_last, tree_scale
from gradhpo.utils.settings import check_count, check_positive, check_seed

__all__ = ["ESMemory", "PESMemory", "es", "pes"]


class ESMemory(NamedTuple):
    """The source of the perturbations."""

    key: jax.Array  # root key, never consumed: draws use fold_in(key, draws)
    draws: jax.Array


class PESMemory(NamedTuple):
    """The particles: N pairs of states, and N sums of perturbations."""

    key: jax.Array
    draws: jax.Array
    plus: InnerState  # N states that train with lam + eps
    minus: InnerState
    xi: Hyper


def es(
    unroll_steps: int, *, sigma: float = 0.01, pairs: int = 16, seed: int = 0, loop: Loop = "scan"
) -> Estimator:
    """Antithetic evolution strategies over a window.

    Args:
        unroll_steps: Inner steps T per outer update.
        sigma: Standard deviation of the perturbations, in the units of lam.
        pairs: N. The standard error falls with its root.
        seed: Of the perturbations.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update: (2 N + 1) T training gradients and 2 N + 1 values of the
    validation loss. Memory: 2 N states while it lasts.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    sigma, pairs, seed, loop = _settings(sigma, pairs, seed, loop)

    def init(inner, lam, window):
        del inner, lam, window
        return ESMemory(jax.random.key(seed), jnp.zeros((), jnp.int32))

    def estimate(problem, memory, inner, lam, window, origin=None):
        memory, eps = _draw(memory, lam, sigma, pairs)

        def validate(lam):
            start = inner if origin is None else begin_episode(problem, origin, lam)[0]
            return _train(problem, start, lam, window, loop)[0]

        def pair(eps):
            plus, minus = validate(optax.tree.add(lam, eps)), validate(optax.tree.sub(lam, eps))
            return (plus - minus) / (2 * sigma**2)

        h = _weighted(jax.vmap(pair)(eps), eps)
        loss, new = _train(problem, inner, lam, window, loop)
        return Estimate(h, new, memory, report(loss, optax.tree.zeros_like(lam), h))

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        differentiates=False,
        starts=True,
        price=_price(unroll_steps, pairs),
    )


def pes(
    unroll_steps: int, *, sigma: float = 0.01, pairs: int = 16, seed: int = 0, loop: Loop = "scan"
) -> Estimator:
    """Persistent evolution strategies: short windows, no truncation bias.

    Args:
        unroll_steps: Inner steps K per outer update; an episode is many windows.
        sigma, pairs, seed, loop: As in `es`.

    Cost per outer update: (2 N + 1) K training gradients and 2 N + 1 values of the
    validation loss. Memory: 2 N states and N trees of hyperparameters.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    sigma, pairs, seed, loop = _settings(sigma, pairs, seed, loop)

    def init(inner, lam, window):
        del window
        return _particles(jax.random.key(seed), jnp.zeros((), jnp.int32), inner, lam)

    def _particles(key, draws, inner, lam):
        def copies(x):
            return jnp.repeat(jnp.asarray(x)[None], pairs, axis=0)

        start = jax.tree.map(copies, inner)
        xi = jax.tree.map(lambda x: jnp.zeros((pairs, *jnp.shape(x)), jnp.result_type(x)), lam)
        return PESMemory(key, draws, start, jax.tree.map(jnp.copy, start), xi)

    def reset(memory, inner, lam):
        return _particles(memory.key, memory.draws, inner, lam)

    def estimate(problem, memory, inner, lam, window, origin=None):
        memory, eps = _draw(memory, lam, sigma, pairs)
        if origin is not None:  # the first window: every particle has a start of its own
            start = jax.vmap(lambda lam: strengthen(begin_episode(problem, origin, lam)[0]))
            around = [jax.tree.map(op, lam, eps) for op in (jnp.add, jnp.subtract)]
            memory = memory._replace(plus=start(around[0]), minus=start(around[1]))

        def pair(eps, plus, minus):
            a, plus = _train(problem, plus, optax.tree.add(lam, eps), window, loop)
            b, minus = _train(problem, minus, optax.tree.sub(lam, eps), window, loop)
            return (a - b) / (2 * sigma**2), plus, minus

        weights, plus, minus = jax.vmap(pair)(eps, memory.plus, memory.minus)
        memory = memory._replace(plus=plus, minus=minus, xi=optax.tree.add(memory.xi, eps))
        h = _weighted(weights, memory.xi)
        loss, new = _train(problem, inner, lam, window, loop)
        return Estimate(h, new, memory, report(loss, optax.tree.zeros_like(lam), h))

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        reset=reset,
        follows=True,
        differentiates=False,
        starts=True,
        price=_price(unroll_steps, pairs),
    )


def _price(unroll_steps: int, pairs: int) -> Callable[[int], Cost]:
    """Values of the validation loss count as gradients; there is one more run, unperturbed."""
    return lambda size: Cost((2 * pairs + 1) * (unroll_steps + 1), 0)


def _settings(sigma: Any, pairs: Any, seed: Any, loop: Any) -> tuple[float, int, Any, Loop]:
    sigma, pairs = check_positive("sigma", sigma), check_count("pairs", pairs)
    return sigma, pairs, check_seed(seed), check_loop(loop)


def _draw(memory: Any, lam: Hyper, sigma: float, pairs: int) -> tuple[Any, Hyper]:
    """N perturbations of lam, stacked."""
    key = jax.random.fold_in(memory.key, memory.draws)
    leaves, structure = jax.tree.flatten(lam)
    keys = jax.random.split(key, len(leaves))
    eps = [
        sigma * jax.random.normal(k, (pairs, *jnp.shape(x)), jnp.result_type(x))
        for k, x in zip(keys, leaves, strict=True)
    ]
    memory = memory._replace(draws=optax.safe_increment(memory.draws))
    return memory, jax.tree.unflatten(structure, eps)


def _train(problem: BilevelProblem, inner: InnerState, lam: Hyper, window, loop: Loop):
    """`(F, s_T)`: the validation loss after training through the window."""
    inner = roll(problem.dynamics, inner, lam, window.train, loop=loop)
    batch = tree_last(window.val)
    loss = loss_value(problem.outer_loss, inner.params, lam, batch, inner.model_state)
    return jnp.asarray(loss, scalar_dtype(lam)), inner


def _weighted(weights: jax.Array, directions: Hyper) -> Hyper:
    """`mean_i weights_i directions_i`."""
    mean = tree_scale(1 / len(weights), directions)
    return jax.tree.map(lambda d: jnp.tensordot(weights.astype(d.dtype), d, axes=1), mean)
