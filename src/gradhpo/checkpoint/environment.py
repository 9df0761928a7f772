"""What bits depend on beside the state: versions, devices, and settings of JAX.

An allow-list: the environment of a process may hold secrets.
"""

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

__all__ = ["TRACING", "environment"]

TRACING = ("gradhpo", "jax", "jaxlib")  # on which it depends how a program looks
PACKAGES = (*TRACING, "numpy", "optax")
SETTINGS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_disable_most_optimizations",
    "jax_numpy_dtype_promotion",
)


def environment() -> dict[str, Any]:
    """Facts by name, as JSON has them.

    >>> sorted(environment())[:3]
    ['XLA_FLAGS', 'backend', 'device']
    """
    settings = {name: jax.config.values.get(name) for name in SETTINGS}
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": _processor(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **{name: value if value is None else str(value) for name, value in settings.items()},
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # run from its sources


@functools.cache
def _processor() -> str:
    """The compiler writes for the processor at hand."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, "")
    except OSError:
        return platform.processor()
