"""The user's functions, called while tracing: a failure is explained, and its remedy named."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.utils.validation import leaves_with_names

__all__ = ["check_scalar", "explain_call", "explain_loops", "explain_update"]


@contextlib.contextmanager
def explain_call(
    name: str, function: Callable, params: Any, hyperparams: Any, *others: Any
) -> Iterator[None]:
    """Say what `function(params, hyperparams, batch[, model_state])` was given where tracing it
    fails, and name the remedy where it is one of the usual mistakes: another number of arguments,
    two of them exchanged."""
    try:
        yield
    except Exception as error:
        if any(name in note for note in getattr(error, "__notes__", ())):
            raise  # explained where it was called
        given = dict(zip(_ARGUMENTS, (params, hyperparams, *others), strict=False))
        leaves = (f"{what} leaves {_shapes(given[what])}" for what in sorted(given, key=_first))
        called = f"{name}({', '.join(given)})"
        error.add_note(f"gradhpo: {called} failed while being traced with " + "; ".join(leaves))
        if isinstance(error, TypeError) and (signature := _unfit_signature(function, len(given))):
            stateful = "model_state" in given
            error.add_note(
                f"gradhpo: {name} is written as {signature}, but is called with "
                f"{('three', 'four')[stateful]} arguments: ({', '.join(given)}). Take all of them, "
                "whether or not all are used; close over anything else."
                + (
                    " The fourth is the model state that was given to init."
                    if stateful
                    else " A fourth, model_state, comes where init(..., model_state=...) got one."
                    if not _unfit_signature(function, 4)
                    else ""
                )
            )
        elif _runs(function, hyperparams, params, *others):
            error.add_note(
                f"gradhpo: {name} runs with its first two arguments exchanged. The order is "
                f"init(params, hyperparams) and {called}."
            )
        raise


_ARGUMENTS = ("params", "hyperparams", "batch", "model_state")


def _first(argument: str) -> bool:
    """The batch is named first: it is the usual culprit."""
    return argument != "batch"


def _shapes(tree: Any) -> str:
    return ", ".join(f"{name}: {np.shape(x)}" for name, x in leaves_with_names(tree)) or "none"


def _unfit_signature(function: Callable, count: int) -> str:
    """The signature of a function that cannot take so many arguments, else nothing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return ""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return str(signature)
    return ""


def _runs(function: Callable, *arguments: Any) -> bool:
    try:
        jax.eval_shape(function, *arguments)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def explain_loops() -> Iterator[None]:
    """Add the remedy to what JAX says of a loop without a reverse mode."""
    try:
        yield
    except ValueError as error:
        note = (
            "gradhpo: use lax.scan, or lax.fori_loop with bounds that are Python numbers (a "
            "convergence test becomes a fixed number of steps). If the loop must stay: inside an "
            "update_fn, forward mode goes through it (ForwardOptimizer); in the validation loss "
            "as well, evolution strategies do (ESOptimizer, PESOptimizer)."
        )
        if "while_loop" in str(error) and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


@contextlib.contextmanager
def explain_update() -> Iterator[None]:
    """Say what an inner optimizer is given where its update fails."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "gradhpo: in the update of the inner optimizer. It sees the floating-point leaves of "
            "params and a gradient shaped like them. An optimizer that wants parameters of a kind "
            "of its own (optax.lookahead) goes into an update_fn, a learning rate per leaf into "
            "optax.chain(..., gradhpo.transforms.scale_by_tree(tree))."
        )
        raise


def check_scalar(name: str, value: Any) -> None:
    """What a loss returns as its value must be one floating-point scalar."""
    if isinstance(value, float | int):
        value = np.asarray(value)
    expected = f"{name} must return one floating-point scalar"
    leaves = leaves_with_names(value)
    if isinstance(value, (tuple, list)):
        raise TypeError(
            f"{expected}, but returned a {type(value).__name__} of {len(value)} values. With "
            "metrics it returns (loss, metrics), a tuple of a scalar and a dictionary of scalars."
        )
    if value is None or len(leaves) != 1 or not hasattr(value, "dtype"):
        raise TypeError(f"{expected}, but returned {value!r}. Is a `return` missing?")
    if value.shape != ():
        raise TypeError(
            f"{expected}, but returned shape {value.shape}. Reduce it over the examples, for "
            "example with jnp.mean."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{expected}, but returned {value.dtype}. An accuracy or a count has no gradient; "
            "use a differentiable loss."
        )
