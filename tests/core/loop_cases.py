"""One problem and every estimator on it, for the tests of the loop and its guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import (
    BilevelProblem,
    Window,
    finite_difference,
    first_order,
    from_optax,
    greedy,
    hyperdistill,
    init_state,
    one_step,
    reverse,
)
from gradhpo.utils._partition import split

T = 4
ESTIMATORS = {
    "first_order": first_order(),
    "one_step": one_step(),
    "averaged": one_step(0.9),
    "finite_difference": finite_difference(),
    "greedy": greedy(0.9, 2),
    "hyperdistill": hyperdistill(0.9),
    "reverse": reverse(T),
}


@jax.jit
def train_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) * jnp.exp(lam["scale"]) / 2


@jax.jit
def val_loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) + 0.1 * lam["scale"] ** 2


PROBLEM = BilevelProblem(
    from_optax(train_loss, lambda lam: optax.sgd(jnp.exp(lam["rate"]), momentum=0.9)),
    val_loss,
    train_loss,
)
LAM = {"rate": jnp.array(-2.0), "scale": jnp.array(0.1)}
PARAMS = {"w": jnp.array([1.0, -2.0])}


def data(*leading):
    numbers = np.random.default_rng(0).standard_normal((2, *leading, 3, 2))
    return Window(*jnp.asarray(numbers, jnp.float32))


def fresh(estimator, outer=None, params=PARAMS, problem=PROBLEM):
    window = jax.tree.map(lambda x: x[: estimator.unroll_steps], data(T))
    return init_state(problem, estimator, outer, params, LAM, window)


def what_counts(state):
    """Weights, hyperparameters and slots; not the keys and the fit's NaN."""
    return split((state.params, state.hyperparams, state.inner_opt_state, state.outer_opt_state))[0]
