"""Outer updates: how hyperparameters follow their hypergradient. See `gradhpo.core.outer`."""

from gradhpo.core.outer import Outer, descent, followed_by, from_optimizer

__all__ = ["Outer", "descent", "followed_by", "from_optimizer"]
