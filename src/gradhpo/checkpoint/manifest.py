"""What is said of a checkpoint, beside its arrays: `manifest.json`."""

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.checkpoint.directory import MOST
from gradhpo.checkpoint.errors import CheckpointDamaged, CheckpointMismatch
from gradhpo.checkpoint.leaves import Leaf, is_storable

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
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if len(text) > MOST:
            raise ValueError(f"{len(leaves)} leaves are too many for one {FILE}; stack them")
        return text


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
        for name, kind in _KINDS.items():
            if type(getattr(manifest, name)) is not kind:
                raise ValueError(f"{name} is no {kind.__name__}")
        leaves = [_leaf(entry) for entry in manifest.leaves]  # type: ignore[arg-type]
        return manifest._replace(leaves=leaves)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{FILE} is missing") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{FILE} is no manifest of gradhpo ({error})") from None


_KINDS = {
    "step": int,
    "about": dict,
    "position": dict,
    "metrics": list,
    "environment": dict,
    "leaves": list,
}


def _leaf(entry: dict[str, Any]) -> Leaf:
    leaf = Leaf(**entry)
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise ValueError(f"a leaf of the shape {shape}")
    if not (is_storable(dtype) and type(leaf.path) is type(leaf.sha256) is str):
        raise ValueError("a leaf that is none")
    return leaf._replace(shape=shape, dtype=dtype.name)


def as_json(value: Any, name: str = "") -> Any:
    """Settings as JSON has them.

    Raises:
        TypeError: one has no form there; names it.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return as_json(np.asarray(value).tolist(), name)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, PathLike):
        return as_json(os.fspath(value), name)
    raise TypeError(f"{name or 'it'} is a {type(value).__name__}, which JSON has no form for.")
