"""Programs are kept for later calls, and what they hold with them; here they are let go."""

import functools
from collections.abc import Callable
from typing import Any

from gradhpo.core.estimator import compiled
from gradhpo.driver._recompilation import compilations

__all__ = ["clear_caches", "kept"]

KEPT = 32
_caches: list[Any] = [compiled]


def kept(make: Callable) -> Any:
    """`make` with a bounded cache that `clear_caches` empties: what falls out is freed."""
    cached = functools.lru_cache(maxsize=KEPT)(make)
    _caches.append(cached)
    return cached


def clear_caches() -> None:
    """Forget every compiled program of runs and classes, and the data that its losses close over.

    Nothing else of the library keeps a loss alive. What is used again is compiled again; states,
    optimizers and `Resident` data sets stay valid. (`jax.clear_caches` empties JAX's own caches,
    of every program there is.)

    >>> clear_caches()
    """
    for cached in _caches:
        cached.cache_clear()
    compilations.clear()
