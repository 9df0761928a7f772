"""The leaves of a tree as plain arrays, each with its name, type and digest."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.checkpoint.errors import CheckpointMismatch
from gradhpo.utils.validation import leaves_with_names

__all__ = [
    "Leaf",
    "check_matches",
    "decoded",
    "digest",
    "encoded",
    "held",
    "is_storable",
    "packed",
    "template_of",
    "unpacked",
]


class Leaf(NamedTuple):
    """What a manifest says of a leaf."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    key: str | None = None  # of a typed PRNG key: its implementation

    @property
    def kind(self) -> str:
        """As shown to users."""
        dtype = self.dtype if self.key is None else f"key<{self.key}>"
        return f"{dtype}{list(self.shape)}"

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return int(np.prod(self.shape, dtype=object)) * jnp.dtype(self.dtype).itemsize


def is_storable(dtype: Any) -> bool:
    """Whether JAX computes with a dtype of NumPy's."""
    kinds = (np.bool_, np.number)
    return hasattr(jnp, dtype.name) and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def held(tree: Any) -> Any:
    """The tree as it is now, whatever is written into arrays of NumPy later, and whatever type
    another thread would give to Python's numbers.

    Raises:
        TypeError: a leaf is no array and no number; names it, as the others do.
        ValueError: a leaf has been donated, lies in part in other processes, or is too large a
            number.
    """
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if (error := _refused(leaf)) is not None:  # names take long, so there is one here alone
            raise type(error)(f"leaf {leaves_with_names(tree)[i][0]} {error}")
    return structure.unflatten(
        x if isinstance(x, jax.Array) else np.array(x, _dtype(x)) for x in leaves
    )


def _dtype(leaf: Any) -> Any:
    """Its own, or the one that JAX gives to a number of Python's."""
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def _refused(leaf: Any) -> Exception | None:
    if isinstance(leaf, Tracer):
        return TypeError("is being traced: save outside of jit, scan and vmap.")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            return ValueError("has been donated: save the state before that, and wait.")
        if not leaf.is_fully_addressable:
            return ValueError(
                "lies in part in other processes; gather it first "
                "(jax.experimental.multihost_utils.process_allgather), and save in one of them."
            )
    elif isinstance(leaf, np.ndarray | np.generic):
        if not is_storable(leaf.dtype):
            return TypeError(f"has the dtype {leaf.dtype}, which JAX does not know.")
    elif isinstance(leaf, int):
        dtype = jnp.result_type(int)
        if not jnp.iinfo(dtype).min <= leaf <= jnp.iinfo(dtype).max:
            return ValueError(f"is {leaf}, which {dtype.name} cannot hold.")
    elif not isinstance(leaf, float | complex):
        return TypeError(
            f"is a {type(leaf).__name__}, and a checkpoint holds arrays and numbers: keep it "
            "beside the state, in about=."
        )
    return None


def encoded(tree: Any) -> list[tuple[Leaf, np.ndarray]]:
    """All leaves on the host, in the order of the tree.

    Typed PRNG keys become their words, Python numbers arrays of the type that JAX gives them.

    Raises:
        TypeError, ValueError: as `held`.
    """
    pairs = []
    for path, leaf in leaves_with_names(tree):
        if (error := _refused(leaf)) is not None:
            raise type(error)(f"leaf {path} {error}")
        array, key = _plain(leaf)
        pairs.append((_leaf(path, array, key), array))
    return pairs


def _plain(leaf: Any) -> tuple[np.ndarray, str | None]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf))
    array = np.asarray(leaf, _dtype(leaf))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(array).reshape(array.shape), None


def _leaf(path: str, array: np.ndarray, key: str | None) -> Leaf:
    return Leaf(path, array.dtype.name, array.shape, digest(array), key)


def digest(array: np.ndarray) -> str:
    """SHA-256 of the elements of a contiguous array, row by row."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def packed(array: np.ndarray) -> np.ndarray:
    """As every file format can hold it: types beyond NumPy's own (bfloat16 …) as integers."""
    own = array.dtype.kind != "V"
    return array if own else array.view(np.dtype(f"u{array.dtype.itemsize}"))


def unpacked(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Inverse of `packed`."""
    return array.view(jnp.dtype(leaf.dtype))


def template_of(leaf: Leaf) -> Any:
    """Something of the type of what was saved, for a template."""
    if leaf.key is None:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    return jax.random.wrap_key_data(jnp.zeros(leaf.shape, leaf.dtype), impl=leaf.key)


def _wanted(tree: Any) -> list[Leaf]:
    """The leaves of a template, without digests."""
    found = []
    for path, leaf in leaves_with_names(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            words = jax.eval_shape(jax.random.key_data, leaf)
            impl = str(jax.random.key_impl(leaf))
            found.append(Leaf(path, words.dtype.name, words.shape, "", impl))
        else:
            dtype = jnp.result_type(leaf) if dtype is None else np.dtype(dtype)
            found.append(Leaf(path, dtype.name, np.shape(leaf), ""))
    return found


def decoded(template: Any, leaves: list[Leaf], arrays: list[np.ndarray]) -> Any:
    """The tree of a template with the content of these leaves, which match it.

    An array of NumPy comes back where the template has one; an array of JAX goes where that of the
    template lies.
    """
    places, structure = jax.tree.flatten(template)
    filled = map(_filled, places, leaves, arrays)
    return jax.tree.unflatten(structure, filled)


def _filled(place: Any, leaf: Leaf, array: np.ndarray) -> Any:
    if isinstance(place, np.ndarray | np.generic):
        return array if isinstance(place, np.ndarray) else array[()]
    value = jnp.array(array)
    if leaf.key is not None:
        value = jax.random.wrap_key_data(value, impl=leaf.key)
    if isinstance(place, jax.Array) and place.committed:
        value = jax.device_put(value, place.sharding)
    return value


def check_matches(where: str, template: Any, leaves: list[Leaf]) -> None:
    """A template of the very leaves of a checkpoint.

    Raises:
        CheckpointMismatch: names the first that differs.
    """
    places = _wanted(template)
    for place, leaf in zip(places, leaves, strict=False):
        if place.path != leaf.path:
            raise CheckpointMismatch(
                f"{where} holds leaf {leaf.path} ({leaf.kind}) where the template has {place.path} "
                f"({place.kind}): {_REMEDY}"
            )
        if place.kind != leaf.kind:
            raise CheckpointMismatch(
                f"leaf {leaf.path} is {leaf.kind} in {where}, but {place.kind} in the template: "
                f"{_REMEDY}"
            )
    if len(places) != len(leaves):
        longer, what = (leaves, "the template") if len(leaves) > len(places) else (places, where)
        extra = longer[min(len(leaves), len(places))]
        raise CheckpointMismatch(f"{what} has no leaf {extra.path} ({extra.kind}): {_REMEDY}")


_REMEDY = (
    "make it by init with the model, hyperparameters, optimizers and method that were saved "
    "(HyperDistill and others that keep a batch need init(..., train_batch))."
)
