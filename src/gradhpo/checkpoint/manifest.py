"""What is said of a checkpoint, beside its arrays: `manifest.json`."""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo.checkpoint.directory import MOST
from gradhpo.checkpoint.errors import CheckpointDamaged, CheckpointMismatch
from gradhpo.checkpoint.leaves import Leaf

__all__ = ["FILE", "FORMAT", "Manifest", "as_json", "read_manifest"]

FILE = "manifest.json"
FORMAT = 1
"""Raised by a change after which older versions would misread; older formats stay readable."""


class Manifest(NamedTuple):
    """One checkpoint.

    Attributes:
        step: `state.step`, or the number it was saved under.
        about: Of what run: settings, programs and data, by name. A run that goes on has the same.
        position: Where its sources of data stand.
        metrics: The names in `state.metadata`.
        environment: Versions, devices and settings of JAX.
        leaves: All leaves, in the order of the tree.
    """

    step: int
    about: dict[str, Any]
    position: dict[str, Any]
    metrics: list[str]
    environment: dict[str, Any]
    leaves: list[Leaf]

    def to_json(self) -> str:
        """The content of the file."""
        leaves = [leaf._asdict() for leaf in self.leaves]
        content = {"format": FORMAT} | self._asdict() | {"leaves": leaves}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """That of a checkpoint whose files have been verified.

    Raises:
        CheckpointDamaged: it is none.
        CheckpointMismatch: a newer version of gradhpo has written it.
    """
    file = path / FILE
    try:
        if file.stat().st_size > MOST:
            raise CheckpointDamaged(f"{FILE} is larger than {MOST >> 20} MiB")
        content = json.loads(file.read_bytes())
        number = content.pop("format")
        if isinstance(number, int) and number > FORMAT:
            raise CheckpointMismatch(
                f"{path} has format {number}, and this gradhpo reads up to {FORMAT}: update "
                f"gradhpo (it was written by {content['environment']['gradhpo']})."
            )
        if number != FORMAT:
            raise ValueError(f"format {number!r}")
        manifest = Manifest(**content)
        leaves = [_leaf(entry) for entry in manifest.leaves]  # type: ignore[arg-type]
        if type(manifest.step) is not int or not isinstance(manifest.about, dict):
            raise ValueError("step or about of a wrong type")
        return manifest._replace(leaves=leaves)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{FILE} is missing") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{FILE} is no manifest of gradhpo ({error})") from None


def _leaf(entry: dict[str, Any]) -> Leaf:
    leaf = Leaf(**entry)
    shape = tuple(leaf.shape)
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"leaf {leaf.path} of the shape {shape}")
    return leaf._replace(shape=shape, dtype=np.dtype(_named(leaf.dtype)).name)


def _named(dtype: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(dtype)


def as_json(value: Any) -> Any:
    """Settings as JSON has them; what it has no form for by its type alone."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, PathLike) else type(value).__name__
