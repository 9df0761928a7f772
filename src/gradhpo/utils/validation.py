"""Checks of what the user hands in, made once at the border.

Every message has the rule, the leaf with the value seen, and the remedy. Structure is
checked when a call is first traced, with an exception; numerics are reported as a status
(`gradhpo.core.status`), because an exception cannot leave compiled code.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.utils._modules import check_taken_apart
from gradhpo.utils._partition import NOT_REAL

__all__ = [
    "GradhpoWarning",
    "check_alike",
    "check_arrays",
    "check_batch",
    "check_hyperparams",
    "check_params",
    "check_same_avals",
    "check_same_structure",
    "check_start",
    "complain",
    "difference",
    "explain_leaves",
    "leaves_with_names",
    "nonfinite_rows",
]


class GradhpoWarning(UserWarning):
    """Something legal that is almost never meant: an ignored hyperparameter, a recompilation."""


def complain(message: str, strict: bool) -> None:
    """Warn, or raise ValueError where the user asked for `strict=True`."""
    if strict:
        raise ValueError(message)
    frame, level = sys._getframe(), 1  # point at the first line outside this package and JAX
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("gradhpo.", "jax.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GradhpoWarning, stacklevel=level)


def leaves_with_names(tree: Any) -> list[tuple[str, Any]]:
    """`[(name, leaf)]` with names such as `['w1'][0]`; a bare leaf is called `the value itself`.

    >>> leaves_with_names({"lr": 0.1})
    [("['lr']", 0.1)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "the value itself", leaf) for path, leaf in flat]


def check_hyperparams(hyperparams: Any) -> None:
    """Every leaf a floating-point array or number, and at least one of them."""
    leaves = leaves_with_names(hyperparams)
    if not leaves:
        raise ValueError("hyperparams has no leaves: there is nothing to tune.")
    for name, leaf in leaves:
        dtype = _dtype("hyperparams", name, leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"every hyperparameter must be floating point, but leaf {name} is {dtype} "
                f"(value {_short(leaf)}). Cast it (jnp.asarray(x, jnp.float32)), or write 8.0 for "
                "8; that it is a whole number or a choice is declared in a task's space=, by "
                "gradhpo.spaces.integer or categorical."
            )


def check_start(params: Any, hyperparams: Any, model_state: Any) -> None:
    """What a state begins with; where it is not traced, the hyperparameters must be finite."""
    check_params(params)
    check_hyperparams(hyperparams)
    check_arrays("the model state", model_state)
    for name, leaf in leaves_with_names(hyperparams):
        if not isinstance(leaf, Tracer) and nonfinite_rows(np.atleast_1d(leaf)):
            raise ValueError(
                f"leaf {name} of hyperparams is not finite (value {_short(leaf)}), so that no "
                "update of it would be. Start from a number, -20.0 for the logarithm of 0, say."
            )


def check_params(params: Any) -> None:
    """At least one floating-point leaf and none complex; others are carried through untouched."""
    check_taken_apart(params)
    dtypes = {name: _dtype("params", name, leaf) for name, leaf in leaves_with_names(params)}
    for name, dtype in dtypes.items():
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"leaf {name} of params: {NOT_REAL.format(dtype)}")
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes.values()):
        seen = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items()) or "no leaves"
        raise TypeError(
            f"params has no floating-point leaf, so there is nothing to train; got {seen}."
        )


def _dtype(what: str, name: str, leaf: Any) -> Any:
    """The dtype a leaf will have as an array; what JAX would silently truncate is refused."""
    dtype = _array_dtype(what, name, leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 and dtype != leaf.dtype:
        raise TypeError(
            f"leaf {name} of {what} is float64, but JAX has 64-bit types switched off and would "
            "silently truncate it. Cast it with .astype(np.float32), or switch them on first: "
            "jax.config.update('jax_enable_x64', True)."
        )
    return dtype


def _array_dtype(what: str, name: str, leaf: Any) -> Any:
    """The dtype a leaf will have as an array, whose memory and whose numbers have to be there."""
    _check_alive(what, name, leaf)
    try:
        if isinstance(leaf, str | bytes | type | np.dtype):  # they would name a dtype
            raise TypeError
        dtype = jnp.result_type(leaf)
    except (TypeError, OverflowError):
        if isinstance(leaf, np.ndarray | np.generic):  # an array of text or of Python objects
            raise TypeError(
                f"leaf {name} of {what} has dtype {leaf.dtype}, which JAX has no arrays of. Encode "
                "it as numbers, or leave it out."
            ) from None
        raise TypeError(
            f"leaf {name} of {what} is not an array but {leaf!r} ({type(leaf).__name__}). "
            "Keep settings that are not numbers out of it, for example in a closure."
        ) from None
    whole = isinstance(leaf, int | np.integer | np.ndarray) and jnp.issubdtype(dtype, jnp.integer)
    if whole and np.size(leaf):
        limits = jnp.iinfo(dtype)
        for extreme in (np.min(leaf), np.max(leaf)):
            if not limits.min <= extreme <= limits.max:
                raise ValueError(
                    f"leaf {name} of {what} holds {extreme}, which is too large for {dtype}, the "
                    "widest integer type with JAX's 64-bit types switched off. Switch them on "
                    "first, jax.config.update('jax_enable_x64', True), or keep it out of there."
                )
    return dtype


def _check_alive(what: str, name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or not leaf.is_deleted():
        return
    raise ValueError(
        f"leaf {name} of {what} is an array that has been deleted: it was donated, by "
        "donate_argnums= of a jit of yours, say. gradhpo donates nothing that it is given. Go on "
        "from what the call that took it returned, or do not donate it."
    )


@contextlib.contextmanager
def explain_leaves(**trees: Any) -> Iterator[None]:
    """Where a call fails because of a leaf that is no array, or is one no more, say which.

    For calls in a loop: what does not fail is not looked at.
    """
    try:
        yield
    except Exception:
        try:
            for what, tree in trees.items():
                for name, leaf in leaves_with_names(tree):
                    _array_dtype(what, name, leaf)
        except (TypeError, ValueError) as refusal:
            raise refusal from None
        raise


def check_arrays(what: str, tree: Any) -> None:
    """Every leaf an array or a number of a type that JAX has now, and its memory still there.

    >>> check_arrays("the model state", {"mean": np.zeros(3, np.float32), "seen": 0})
    """
    for name, leaf in leaves_with_names(tree):
        _dtype(what, name, leaf)


def _short(leaf: Any) -> str:
    known = isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex)
    text = str(leaf) if known and np.size(leaf) <= 4 and not isinstance(leaf, Tracer) else ""
    return text or f"of shape {np.shape(leaf)}"


def check_same_structure(what: str, old: Any, new: Any) -> None:
    """Raise unless the trees have one structure; the message has the first path that differs."""
    if jax.tree.structure(old) == jax.tree.structure(new):
        return
    before, after = (len(jax.tree.leaves(tree)) for tree in (old, new))
    raise ValueError(
        f"{what} must keep its structure ({before} leaves), but got one with {after} leaves: "
        f"{difference(old, new)}."
    )


def difference(old: Any, new: Any) -> str:
    """Where two trees first differ in structure or shape; empty if they do not.

    >>> difference({"a": np.zeros(2)}, {"a": np.zeros(3)})
    "leaf ['a'] has shape (2,) against (3,)"
    """
    before, after = leaves_with_names(old), leaves_with_names(new)
    if jax.tree.structure(old) == jax.tree.structure(new):
        for (name, x), (_, y) in zip(before, after, strict=True):
            if np.shape(x) != np.shape(y):
                return f"leaf {name} has shape {np.shape(x)} against {np.shape(y)}"
        return ""
    before, after = [name for name, _ in before], [name for name, _ in after]
    for first, second in zip(before, after, strict=False):
        if first != second:
            return f"the first difference is leaf {first} against {second}"
    longer = before[len(after) :] or after[len(before) :]
    return f"leaf {longer[0]} is only in one of them" if longer else "their containers differ"


def check_same_avals(old: Any, new: Any, *, rule: str, remedy: str) -> None:
    """Two trees of shapes must agree in structure, shapes and dtypes, or nothing can be scanned."""
    check_same_structure(rule.partition(" must ")[0] + ": what it returns", old, new)
    for (name, before), (_, after) in zip(
        leaves_with_names(old), leaves_with_names(new), strict=True
    ):
        seen = tuple(f"{x.dtype}{list(x.shape)}" for x in (before, after))
        if seen[0] != seen[1]:
            raise ValueError(f"{rule}, but leaf {name} went from {seen[0]} to {seen[1]}. {remedy}")


def check_batch(what: str, batch: Any) -> None:
    """Raise unless every leaf is an array, and one of those that have axes is not empty."""
    leaves = leaves_with_names(batch)
    for name, leaf in leaves:
        _array_dtype(what, name, leaf)
    shapes = {name: np.shape(leaf) for name, leaf in leaves if np.ndim(leaf)}
    if shapes and all(shape[0] == 0 for shape in shapes.values()):
        name, shape = next(iter(shapes.items()))
        raise ValueError(
            f"{what}: empty batch. Leaf {name} has shape {shape}, and a mean over no "
            "examples is NaN; leave it out."
        )


def check_alike(what: str, first: Any, batch: Any, t: int) -> list[Any]:
    """The leaves of batch number t of an episode, laid out as `first` (shapes and dtypes) says."""
    wanted, layout = jax.tree.flatten(first)
    leaves, structure = jax.tree.flatten(batch)
    if structure != layout:
        check_same_structure(f"{what} (batch {t} of the episode)", first, batch)
    for i, (aval, leaf) in enumerate(zip(wanted, leaves, strict=True)):
        one, other = (aval.shape, aval.dtype), (np.shape(leaf), jnp.result_type(leaf))
        if one == other:
            continue
        name, _ = leaves_with_names(first)[i]
        kind = int(one[0] == other[0])
        raise ValueError(
            f"{what} must return batches of one {('shape', 'dtype')[kind]}, but leaf {name} is "
            f"{one[kind]} in batch 1 and {other[kind]} in batch {t} of the episode. "
            + ("Drop or pad the last partial batch of an epoch.", "Cast it.")[kind]
        )
    return leaves


def nonfinite_rows(values: Any) -> tuple[tuple[int, ...], int] | None:
    """The first index that holds NaN or infinity and the number of such rows, or None.

    >>> nonfinite_rows(np.array([[0.0, 1.0], [np.nan, np.inf]]))
    ((1, 0), 1)
    """
    on_device = isinstance(values, jax.Array)
    finite = np.asarray(jnp.isfinite(values) if on_device else np.isfinite(values))
    if finite.all():
        return None
    index = tuple(int(i) for i in np.argwhere(~finite)[0])
    return index, int((~finite).reshape(len(finite), -1).any(axis=1).sum())
