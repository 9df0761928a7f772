"""Programs are kept for later calls, and what they hold with them; here they are let go."""

import functools
from collections.abc import Callable
from typing import Any

from gradhpo.core.estimator import compiled
from gradhpo.driver._recompilation import compilations

__all__ = ["cached", "clear_caches"]

PROGRAMS = 32  # of every kind: some MB each
_caches: list[Any] = [compiled]


def cached(make: Callable) -> Any:
    """`make` with a bounded cache that `clear_caches` empties: what falls out is freed."""
    made = functools.lru_cache(maxsize=PROGRAMS)(make)
    _caches.append(made)
    return made


def clear_caches() -> None:
    """Forget every compiled program of runs and classes, and the data that its losses close over.

    Nothing else of the library keeps a loss alive. What is used again is compiled again; states,
    optimizers and `Resident` data sets stay valid. (`jax.clear_caches` empties JAX's own caches,
    of every program there is.)

    >>> clear_caches()
    """
    for each in _caches:
        each.cache_clear()
    compilations.clear()
