"""Optax gradient transformations that Optax lacks."""

from gradhpo.transforms.retraceable import adam, momentum_sgd
from gradhpo.transforms.reversible import reversible_sgd
from gradhpo.transforms.scaling import scale_by_tree

__all__ = ["adam", "momentum_sgd", "reversible_sgd", "scale_by_tree"]
