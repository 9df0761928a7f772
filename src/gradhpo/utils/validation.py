"""Checks of what the user hands in, made once at the border.

Every message has the rule, the leaf with the value seen, and the remedy. Structure is
checked when a call is first traced, with an exception; numerics are reported as a status
(`gradhpo.core.status`), because an exception cannot leave compiled code.
"""

import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.utils._partition import NOT_REAL

__all__ = [
    "GradhpoWarning",
    "check_batches",
    "check_callable",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_hyperparams",
    "check_number",
    "check_params",
    "check_positive",
    "check_same_avals",
    "check_same_structure",
    "check_scalar_loss",
    "check_seed",
    "complain",
    "leaves_with_names",
    "unless_traced",
]


class GradhpoWarning(UserWarning):
    """Something legal that is almost never meant: an ignored hyperparameter, a recompilation."""


def complain(message: str, strict: bool) -> None:
    """Warn, or raise ValueError where the user asked for `strict=True`."""
    if strict:
        raise ValueError(message)
    frame, level = sys._getframe(), 1  # point at the first line outside this package
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("gradhpo."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GradhpoWarning, stacklevel=level)


def leaves_with_names(tree: Any) -> list[tuple[str, Any]]:
    """`[(name, leaf)]` with names such as `['w1'][0]`; a bare leaf is called `the value itself`.

    >>> leaves_with_names({"lr": 0.1})
    [("['lr']", 0.1)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "the value itself", leaf) for path, leaf in flat]


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """An integer of at least `minimum`, as a Python int.

    >>> check_count("T", 20)
    20
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, got {value!r} ({type(value).__name__})."
        ) from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}.")
    return number


def check_fraction(name: str, value: Any, hint: str = "") -> float:
    """A number in [0, 1], as a Python float (an array would make the settings unhashable).

    >>> check_fraction("gamma", 0.9)
    0.9
    """
    number = _as_float(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {number}.{' ' + hint if hint else ''}")
    return number


def check_number(name: str, value: Any) -> float:
    """A finite number, as a Python float.

    >>> check_number("lr_hyper", np.float32(0.5))
    0.5
    """
    number = _as_float(name, value, "a number")
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    return number


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0, as a Python float.

    >>> check_positive("sigma", 0.1)
    0.1
    """
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {number}.")
    return number


def _as_float(name: str, value: Any, rule: str) -> float:
    """Of a number or an array of shape (); `float` alone would also take text."""
    try:
        if np.shape(value) != () or isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {rule}, got {value!r}.") from None


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words.

    >>> check_choice("loop", "scan", ("scan", "unroll", "host"))
    'scan'
    """
    if not isinstance(value, str) or value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}.")
    return value


def unless_traced(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """`check(name, value)`, for a setting that may be traced: a value that only the run knows
    is taken as it is.

    >>> unless_traced(check_positive, "step_size", 0.1)
    0.1
    """
    return value if isinstance(value, Tracer) else check(name, value)


def check_seed(seed: Any) -> Any:
    """A whole number of at least 0; may be traced, as in a `vmap` over seeds."""
    return unless_traced(lambda name, x: check_count(name, x, minimum=0), "seed", seed)


def check_callable(name: str, value: Any, signature: str) -> Callable:
    """A callable; says which one is expected if it is not."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function {signature}, got {value!r} ({type(value).__name__})."
        )
    return value


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
                f"(value {_short(leaf)}). Cast it (jnp.asarray(x, jnp.float32)); for a discrete "
                "choice tune logits and relax them in the loss (softmax, straight-through)."
            )


def check_params(params: Any) -> None:
    """At least one floating-point leaf and none complex; others are carried through untouched."""
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
    """The dtype a leaf will have as an array; float64 input without x64 is refused."""
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        raise TypeError(
            f"leaf {name} of {what} is not an array but {leaf!r} ({type(leaf).__name__}). "
            "Keep settings that are not numbers out of it, for example in a closure."
        ) from None
    if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 and dtype != leaf.dtype:
        raise TypeError(
            f"leaf {name} of {what} is float64, but JAX has 64-bit types switched off and would "
            "silently truncate it. Cast it with .astype(np.float32), or switch them on first: "
            "jax.config.update('jax_enable_x64', True)."
        )
    return dtype


def _short(leaf: Any) -> str:
    text = str(leaf) if np.size(leaf) <= 4 and not isinstance(leaf, Tracer) else ""
    return text or f"of shape {np.shape(leaf)}"


def check_scalar_loss(name: str, loss: Callable, params: Any, hyperparams: Any, batch: Any) -> None:
    """`loss(params, hyperparams, batch)` must be one floating-point scalar; shapes only."""
    try:
        value = jax.eval_shape(loss, params, hyperparams, batch)
    except Exception as error:
        shapes = ", ".join(f"{k}: {np.shape(x)}" for k, x in leaves_with_names(batch))
        error.add_note(
            f"gradhpo: {name}(params, hyperparams, batch) failed while being traced with batch "
            f"leaves {shapes or 'none'} and params leaves "
            + ", ".join(f"{k}: {np.shape(x)}" for k, x in leaves_with_names(params))
        )
        raise
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


def check_same_structure(what: str, old: Any, new: Any) -> None:
    """Two trees of one structure, or an error with the first path where they part."""
    if jax.tree.structure(old) == jax.tree.structure(new):
        return
    before = [name for name, _ in leaves_with_names(old)]
    after = [name for name, _ in leaves_with_names(new)]
    pairs = [*zip(before, after, strict=False), (None, None)]
    first, second = next((a, b) for a, b in pairs if a != b or a is None)
    if first is None:
        longer = before[len(after) :] or after[len(before) :]
        where = f"leaf {longer[0]} is only in one of them" if longer else "their containers differ"
    else:
        where = f"the first difference is leaf {first} against {second}"
    raise ValueError(
        f"{what} must keep its structure ({len(before)} leaves), but got one with {len(after)} "
        f"leaves: {where}."
    )


def check_same_avals(old: Any, new: Any) -> None:
    """Phi must keep the structure, shapes and dtypes of the state, or nothing can be scanned."""
    check_same_structure("the state that Phi returns", old, new)
    for (name, before), (_, after) in zip(
        leaves_with_names(old), leaves_with_names(new), strict=True
    ):
        seen = tuple(f"{x.dtype}{list(x.shape)}" for x in (before, after))
        if seen[0] != seen[1]:
            raise ValueError(
                "Phi must map a state to a state of the same shape and dtype so that it can be "
                f"scanned, but leaf {name} went from {seen[0]} to {seen[1]}. A common cause is a "
                "hyperparameter wider than the parameters; cast it inside update_fn or the "
                "optimizer factory. Another is a learning rate given as a tree shaped like "
                "hyperparams instead of one per leaf."
            )


def check_batches(what: str, batches: list[Any]) -> None:
    """The batches of an episode must share one structure, shape and dtype to be stacked."""
    first = batches[0]
    if any(np.ndim(x) and np.shape(x)[0] == 0 for x in jax.tree.leaves(first)):
        raise ValueError(f"{what} returned an empty batch: a mean over no examples is NaN.")
    structure = jax.tree.structure(first)
    avals = [(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(first)]
    for t, batch in enumerate(batches[1:], start=2):
        leaves, other = jax.tree.flatten(batch)
        if other != structure:
            check_same_structure(f"{what} (batch {t} of the episode)", first, batch)
        for i, ((shape, dtype), leaf) in enumerate(zip(avals, leaves, strict=True)):
            name = leaves_with_names(first)[i][0] if np.shape(leaf) != shape else ""
            if not name and jnp.result_type(leaf) != dtype:
                name, _ = leaves_with_names(first)[i]
                raise ValueError(
                    f"{what} must return batches of one dtype, but leaf {name} is {dtype} in batch "
                    f"1 and {jnp.result_type(leaf)} in batch {t} of the episode. Cast it."
                )
            if name:
                raise ValueError(
                    f"{what} must return batches of one shape, but leaf {name} is {shape} in batch "
                    f"1 and {np.shape(leaf)} in batch {t} of the episode. Drop or pad the last "
                    "partial batch of an epoch."
                )
