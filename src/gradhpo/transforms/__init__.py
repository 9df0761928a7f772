"""Optax gradient transformations that Optax lacks."""

from gradhpo.transforms.scaling import scale_by_tree

__all__ = ["scale_by_tree"]
