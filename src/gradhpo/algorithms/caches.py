"""Programs are kept for later calls, and what they hold with them; here they are let go."""

from gradhpo.algorithms._findings import remembered
from gradhpo.algorithms._programs import initializer, problem_of, programs
from gradhpo.algorithms._recompilation import compilations

__all__ = ["clear_caches"]


def clear_caches() -> None:
    """Forget every compiled program of the classes, and with it the data its losses close over.

    Nothing else of the library keeps a loss alive. What is used again is compiled again; states,
    optimizers and `Resident` data sets stay valid. (`jax.clear_caches` empties JAX's own caches,
    of every program there is.)

    >>> clear_caches()
    """
    for cache in (initializer, problem_of, programs, remembered):
        cache.cache_clear()
    compilations.clear()
