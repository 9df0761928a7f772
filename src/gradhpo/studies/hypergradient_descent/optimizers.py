"""What is compared: SGD and Adam with and without hypergradient descent, and others by Optax."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib
from jax import lax

from gradhpo.transforms import adam_hd, sgd_hd

__all__ = ["OPTIMIZERS", "Entry", "Recipe", "inverse_sqrt", "optimizer"]

L2 = 1e-4  # added to the gradient, not to the loss that is reported


def inverse_sqrt(step: Any) -> jax.Array:
    """The paper's 1 / sqrt(t), with t = 1 in the first step."""
    return lax.rsqrt(step + 1.0)


class Entry(NamedTuple):
    """How to make an optimizer from eta_0 and beta, and where its state has the current rate."""

    make: Callable[..., optax.GradientTransformation]
    rate: Callable[[Any, Any], Any]


def _fixed(state, rate):
    del state
    return rate


def _learned(state, rate):
    del rate
    return optax.tree.get(state, "learning_rate")


def _estimated(state, rate):
    del rate
    return optax.tree.get(state, "estim_lr")


MOMENTUM: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(lambda rate, beta: optax.sgd(rate), _fixed),
    "sgd_hd": Entry(sgd_hd, _learned),
    "sgdn": Entry(lambda rate, beta: optax.sgd(rate, **MOMENTUM), _fixed),
    "sgdn_hd": Entry(partial(sgd_hd, **MOMENTUM), _learned),
    "adam": Entry(lambda rate, beta: optax.adam(rate), _fixed),
    "adam_hd": Entry(adam_hd, _learned),
    # What else needs no learning rate, with Optax's defaults; eta_0 and beta mean nothing here.
    "prodigy": Entry(lambda rate, beta: optax.contrib.prodigy(), _estimated),
    "dadapt": Entry(lambda rate, beta: optax.contrib.dadapt_adamw(), _estimated),
    "mechanize": Entry(
        lambda rate, beta: optax.contrib.mechanize(optax.adam(1.0)),
        lambda state, rate: optax.tree.get(state, "s").sum(),
    ),
    "dog": Entry(
        lambda rate, beta: optax.contrib.dog(),
        lambda state, rate: (
            optax.tree.get(state, "max_dist")
            * lax.rsqrt(optax.tree.get(state, "sum_sq_norm_grads") + 1e-8)
        ),
    ),
}


class Recipe(NamedTuple):
    """One method of a run: its name in `OPTIMIZERS`, beta, whether steps fall as 1 / sqrt(t)."""

    method: str
    beta: float = 0.0
    decays: bool = False


def optimizer(recipe: Recipe, rate: Any, beta: Any = None) -> optax.GradientTransformation:
    """The optimizer on the gradient of the loss with its penalty; `rate` may be traced."""
    learned = recipe.method.endswith("_hd")
    settings = {"schedule": inverse_sqrt} if recipe.decays and learned else {}
    make = OPTIMIZERS[recipe.method].make
    made = make(rate, recipe.beta if beta is None else beta, **settings)
    if recipe.decays and not learned:
        made = optax.chain(made, optax.scale_by_schedule(inverse_sqrt))
    return optax.chain(optax.add_decayed_weights(L2), made)
