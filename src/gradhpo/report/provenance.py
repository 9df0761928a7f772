"""Where a result comes from: versions of the software and the command line.

Nothing here reads environment variables: they may hold secrets.
"""

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import PurePath
from typing import Any

__all__ = ["command", "versions"]


def versions() -> dict[str, Any]:
    """What the numbers may depend on: package versions, JAX backend and float width.

    >>> sorted(versions())
    ['backend', 'gradhpo', 'jax', 'jaxlib', 'numpy', 'optax', 'python', 'x64']
    """
    import jax

    import gradhpo

    packages = ("jax", "jaxlib", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "gradhpo": gradhpo.__version__,
        "backend": jax.default_backend(),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def command(argv: Sequence[str] | None = None) -> str:
    """The command line as one would type it, quoted for a shell.

    Args:
        argv: The arguments after the word `gradhpo`. None takes them from `sys.argv`, where
            another program than `gradhpo` is shown as `python FILE`, without its folder.

    >>> command(["run", "tutorial", "--out", "my results"])
    "gradhpo run tutorial --out 'my results'"
    """
    if argv is not None:
        return shlex.join(["gradhpo", *argv])
    program = PurePath(sys.argv[0]).name
    is_cli = program in ("gradhpo", "gradhpo.exe", "__main__.py", "cli.py")  # with `python -m`
    return shlex.join([*(["gradhpo"] if is_cli else ["python", program]), *sys.argv[1:]])
