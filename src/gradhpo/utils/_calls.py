"""The user's functions, called while tracing: a failure is explained, and its remedy named."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.utils.validation import leaves_with_names

__all__ = ["check_scalar_loss", "explain_call", "explain_loops", "explain_update"]


@contextlib.contextmanager
def explain_call(
    name: str, function: Callable, params: Any, hyperparams: Any, batch: Any
) -> Iterator[None]:
    """Say what `function(params, hyperparams, batch)` was given where tracing it fails, and name
    the remedy where it is one of the usual mistakes: too few arguments, two of them exchanged."""
    try:
        yield
    except Exception as error:
        given = {"batch": batch, "params": params, "hyperparams": hyperparams}
        leaves = (f"{what} leaves {_shapes(tree)}" for what, tree in given.items())
        error.add_note(
            f"gradhpo: {name}(params, hyperparams, batch) failed while being traced with "
            + "; ".join(leaves)
        )
        if isinstance(error, TypeError) and (signature := _unfit_signature(function)):
            error.add_note(
                f"gradhpo: {name} is written as {signature}, but is called with three arguments: "
                "(params, hyperparams, batch). Take all three, whether or not all are used; close "
                "over anything else."
            )
        elif _runs(function, hyperparams, params, batch):
            error.add_note(
                f"gradhpo: {name} runs with its first two arguments exchanged. The order is "
                f"init(params, hyperparams) and {name}(params, hyperparams, batch)."
            )
        raise


def _shapes(tree: Any) -> str:
    return ", ".join(f"{name}: {np.shape(x)}" for name, x in leaves_with_names(tree)) or "none"


def _unfit_signature(function: Callable) -> str:
    """The signature of a function that cannot take three arguments, else nothing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return ""
    try:
        signature.bind(None, None, None)
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


def check_scalar_loss(name: str, loss: Callable, params: Any, hyperparams: Any, batch: Any) -> None:
    """`loss(params, hyperparams, batch)` must be one floating-point scalar; shapes only."""
    with explain_call(name, loss, params, hyperparams, batch):
        value = jax.eval_shape(loss, params, hyperparams, batch)
    expected = f"{name} must return one floating-point scalar"
    leaves = leaves_with_names(value)
    if isinstance(value, (tuple, list)):
        raise TypeError(
            f"{expected}, but returned a {type(value).__name__} of {len(value)} values. "
            "Auxiliary outputs are not accepted: return the loss alone, `return loss`, and "
            "compute the rest in a callback."
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
