"""Where hyperparameters may be, declared leaf by leaf, and how they are kept there."""

from gradhpo.spaces.projections import budget, simplex_rows
from gradhpo.spaces.relaxations import (
    annealed,
    binary_concrete,
    gumbel_softmax,
    straight_through,
)
from gradhpo.spaces.space import (
    Space,
    categorical,
    integer,
    interval,
    log,
    positive,
    probability,
    simplex,
    unconstrained,
)

__all__ = [
    "Space",
    "annealed",
    "binary_concrete",
    "budget",
    "categorical",
    "gumbel_softmax",
    "integer",
    "interval",
    "log",
    "positive",
    "probability",
    "simplex",
    "simplex_rows",
    "straight_through",
    "unconstrained",
]
