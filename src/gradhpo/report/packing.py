"""Values as JSON and back, bit for bit: numbers, text, arrays, and containers of these.

Nothing is loaded by name: a type that is no standard one comes back only if the caller gives it.
"""

import base64
import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import jax
import numpy as np

__all__ = ["pack", "unpack"]


def pack(value: Any, types: Iterable[type] = ()) -> Any:
    """What `json.dumps` writes of a value; `unpack` makes the value of it again.

    Args:
        value: None, booleans, numbers, text; arrays of booleans or numbers; lists, tuples,
            mappings, and objects of `types` with these in them.
        types: NamedTuples, dataclasses and enumerations that may occur.

    Raises:
        TypeError: something else.

    >>> pack((0.1, [None, "a"]))
    {'tuple': [0.1, {'list': [None, 'a']}]}
    """
    types = tuple(types)
    if type(value) in types:
        if isinstance(value, Enum):
            return {"enum": type(value).__name__, "name": value.name}
        return {"record": type(value).__name__, "fields": pack(_fields(value), types)}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _pack_array(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [pack(item, types) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[pack(key, types), pack(item, types)] for key, item in value.items()]}
    raise TypeError(
        f"a part of a run holds arrays, numbers, text, lists, tuples, mappings and the types that "
        f"are given, not a {type(value).__name__}."
    )


def unpack(packed: Any, types: Iterable[type] = ()) -> Any:
    """The inverse of `pack`, with NumPy arrays for those of JAX.

    Raises:
        KeyError, TypeError, ValueError: not of `pack` with these types.

    >>> unpack(pack({"x": np.arange(3)}))
    {'x': array([0, 1, 2])}
    """
    types = tuple(types)
    if not isinstance(packed, dict):
        return packed
    named: dict[str, Any] = {each.__name__: each for each in types}
    if "enum" in packed:
        return named[packed["enum"]][packed["name"]]
    if "record" in packed:
        return named[packed["record"]](**unpack(packed["fields"], types))
    if "array" in packed:
        return _unpack_array(**packed)
    ((kind, items),) = packed.items()
    if kind == "dict":
        return {unpack(key, types): unpack(item, types) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](unpack(item, types) for item in items)


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return value._asdict()


def _pack_array(value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"a part of a run cannot hold an array of {array.dtype}.")
    shape = None if isinstance(value, np.generic) else array.shape  # None: a scalar of NumPy
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"array": text, "dtype": array.dtype.str, "shape": shape}


def _unpack_array(array: str, dtype: str, shape: list[int] | None) -> Any:
    flat = np.frombuffer(base64.b64decode(array, validate=True), np.dtype(dtype))
    return flat[0] if shape is None else flat.reshape(shape).copy()
