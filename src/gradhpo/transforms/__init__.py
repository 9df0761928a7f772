"""Transformations that Optax lacks, of gradients and of outer updates."""

from gradhpo.transforms.hd_optimizers import adam_hd, adamw_hd, sgd_hd
from gradhpo.transforms.hypergradient_descent import (
    HypergradientDescentState,
    hypergradient_descent,
)
from gradhpo.transforms.learned_rates import hypergradient_status, learning_rates
from gradhpo.transforms.proximal import (
    Penalty,
    elastic_net,
    group_lasso,
    in_box,
    l1,
    nuclear,
    on_simplex,
    proximal_adam,
    proximal_sgd,
    within_budget,
)
from gradhpo.transforms.retraceable import adam, momentum_sgd
from gradhpo.transforms.reversible import reversible_sgd
from gradhpo.transforms.scaling import decay_by_tree, scale_by_tree
from gradhpo.transforms.top_k import TopKState, top_k

__all__ = [
    "HypergradientDescentState",
    "Penalty",
    "TopKState",
    "adam",
    "adam_hd",
    "adamw_hd",
    "decay_by_tree",
    "elastic_net",
    "group_lasso",
    "hypergradient_descent",
    "hypergradient_status",
    "in_box",
    "l1",
    "learning_rates",
    "momentum_sgd",
    "nuclear",
    "on_simplex",
    "proximal_adam",
    "proximal_sgd",
    "reversible_sgd",
    "scale_by_tree",
    "sgd_hd",
    "top_k",
    "within_budget",
]
