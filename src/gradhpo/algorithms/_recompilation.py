"""Warnings of what is compiled again and again: new function objects, changing batch shapes."""

from typing import Any

import jax

from gradhpo.core.problem import Window
from gradhpo.core.types import LossFn
from gradhpo.utils.validation import complain

__all__ = ["compilations", "note_compilation", "note_shapes"]

MANY_COMPILATIONS = 4

compilations: dict[Any, list[Any]] = {}
"""By method and code: the functions of the last compilations in a row, by identity."""
SAID = [None]
"""In their place once the warning has been given."""


def note_compilation(
    optimizer: Any, train_loss: LossFn, val_loss: LossFn, compiled: bool, *, run: bool
) -> None:
    """Warn when call after call of `step` or `run` brings its functions as new objects.

    Counted are compilations in a row: a call that finds its program starts the count anew, so
    several problems made by one piece of code do not add up.

    Args:
        run: A call of `run`, which compiles once for many episodes. A search over settings makes a
            new optimizer for each of its runs, so only the losses count; and it is no error.
    """
    named = {"train_loss_fn": train_loss, "val_loss_fn": val_loss}
    if not run:
        named |= {
            "update_fn": optimizer.update_fn,
            "inner_optimizer": optimizer.inner_optimizer,
            "outer_optimizer": optimizer.outer_optimizer,
        }
    key = (type(optimizer), *(_source(f) for f in named.values()))
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
        name
        for name, values in zip(named, zip(*known, strict=True), strict=True)
        if len(set(values)) == len(known)
    ]
    known.pop(0)
    if changing:
        known[:] = SAID
        objects = "is a new object" if len(changing) == 1 else "are new objects"
        complain(
            f"{type(optimizer).__name__} has been compiled {MANY_COMPILATIONS} times, because "
            f"{' and '.join(changing)} {objects} every time. Functions are known by identity: "
            "define them once, outside the loop, and pass the same ones. Data that change go into "
            "the batches.",
            optimizer.strict and not run,
        )


def _source(function: Any) -> Any:
    update = getattr(function, "update", function)  # an Optax transformation
    update = getattr(update, "func", update)  # functools.partial
    return getattr(update, "__code__", type(update))


def note_shapes(optimizer: Any, seen: set[Any], window: Window, *, strict: bool) -> None:
    """Warn once when an optimizer keeps being compiled for new batch shapes.

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
            f"{type(optimizer).__name__} has been compiled {MANY_COMPILATIONS} times; the "
            f"batch shapes were {sorted(seen)}. Keep shapes and dtypes fixed: drop or pad the last "
            "partial batch.",
            strict,
        )
