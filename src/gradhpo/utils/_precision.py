"""64-bit types for a while."""

from contextlib import AbstractContextManager
from typing import Any

import jax

__all__ = ["float64"]


def float64() -> AbstractContextManager[Any]:
    """A context with 64-bit types; the context manager has moved between versions of JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64()
