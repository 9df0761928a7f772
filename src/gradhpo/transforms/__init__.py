"""Optax gradient transformations that Optax lacks."""

from gradhpo.transforms.hd_optimizers import adam_hd, adamw_hd, sgd_hd
from gradhpo.transforms.hypergradient_descent import (
    HypergradientDescentState,
    hypergradient_descent,
)
from gradhpo.transforms.learned_rates import hypergradient_status, learning_rates
from gradhpo.transforms.retraceable import adam, momentum_sgd
from gradhpo.transforms.reversible import reversible_sgd
from gradhpo.transforms.scaling import scale_by_tree

__all__ = [
    "HypergradientDescentState",
    "adam",
    "adam_hd",
    "adamw_hd",
    "hypergradient_descent",
    "hypergradient_status",
    "learning_rates",
    "momentum_sgd",
    "reversible_sgd",
    "scale_by_tree",
    "sgd_hd",
]
