"""Warnings of what is compiled again and again: new function objects, changing batch shapes."""

from collections.abc import Mapping
from typing import Any

import jax

from gradhpo.core.problem import Window
from gradhpo.utils.validation import complain

__all__ = ["compilations", "note_compilation", "note_shapes"]

MANY_COMPILATIONS = 4

compilations: dict[Any, list[Any]] = {}
"""By method and code: the functions of the last compilations in a row, by identity."""
SAID = [None]
"""In their place once the warning has been given."""


def note_compilation(name: str, named: Mapping[str, Any], compiled: bool, *, strict: bool) -> None:
    """Warn when call after call brings its functions as new objects.

    Counted are compilations in a row: a call that finds its program starts the count anew, so
    several problems made by one piece of code do not add up.

    Args:
        name: Of the method.
        named: The functions that it was called with.
        compiled: Whether there was no program for them.
        strict: Raise instead.
    """
    key = (name, *(_source(f) for f in named.values()))
    if not compiled:
        compilations.pop(key, None)
        return
    known = compilations.setdefault(key, [])
    if known == SAID:
        return
    known.append(tuple(id(f) for f in named.values()))
    if len(known) < MANY_COMPILATIONS:
        return
    changing = [
        function
        for function, values in zip(named, zip(*known, strict=True), strict=True)
        if len(set(values)) == len(known)
    ]
    known.pop(0)
    if changing:
        known[:] = SAID
        objects = "is a new object" if len(changing) == 1 else "are new objects"
        complain(
            f"{name} has been compiled {MANY_COMPILATIONS} times, because "
            f"{' and '.join(changing)} {objects} every time. Functions are known by identity: "
            "define them once, outside the loop, and pass the same ones. Data that change go into "
            "the batches.",
            strict,
        )


def _source(function: Any) -> Any:
    update = getattr(function, "update", function)  # an Optax transformation
    update = getattr(update, "func", update)  # functools.partial
    return getattr(update, "__code__", type(update))


def note_shapes(name: str, seen: set[Any], window: Window, *, strict: bool) -> None:
    """Warn once when a method keeps being compiled for new batch shapes.

    Args:
        seen: The shapes so far; this window's are added. The number of steps is none of them.
        strict: Raise instead.
    """
    shapes = tuple(f"{x.dtype}{list(x.shape[1:])}" for x in jax.tree.leaves(window))
    if shapes in seen:
        return
    seen.add(shapes)
    if len(seen) == MANY_COMPILATIONS:
        complain(
            f"{name} has been compiled {MANY_COMPILATIONS} times; the "
            f"batch shapes were {sorted(seen)}. Keep shapes and dtypes fixed: drop or pad the last "
            "partial batch.",
            strict,
        )
