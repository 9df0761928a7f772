"""How the user's losses are called, with a model state and without, and what they may return.

    train_loss(params, hyperparams, batch)               -> loss  or  (loss, metrics)
    train_loss(params, hyperparams, batch, model_state)  -> (loss, (model_state, metrics))
    val_loss(params, hyperparams, batch[, model_state])  -> loss  or  (loss, metrics)

A model state (batch statistics, PRNG keys, counters) is declared by giving one to `init`; from then
on every loss gets it as its fourth argument. Metrics are scalars by name. The model state is
carried from step to step and never differentiated: no derivative goes through a statistic of an
earlier step, whereas the batch statistics that a loss computes from its own batch are a part of it.

Points beside the path of training (averages of weights, DrMAD's line, displaced weights) are
evaluated at the model state that training has at that step. SOBA and SABA take products at the one
before the step; implicit differentiation, AmIGO and StocBiO at the one that the window ends with.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.types import Batch, Hyper, LossFn, MetricDict, Params, PyTree, Scalar
from gradhpo.utils._calls import check_scalar, explain_call
from gradhpo.utils.settings import check_callable

__all__ = ["Evaluated", "has_model_state", "judge", "loss_value", "reported", "train"]


class Evaluated(NamedTuple):
    """What one call of a training loss says."""

    value: Scalar
    model_state: PyTree  # after the call
    metrics: MetricDict


def has_model_state(model_state: PyTree) -> bool:
    """Whether there is a model state, which the losses then get: `()` and None are none, `{}` is.

    >>> has_model_state(()), has_model_state({"mean": 0.0})
    (False, True)
    """
    return not (model_state is None or (isinstance(model_state, tuple) and not model_state))


def _call(
    name: str, loss: LossFn, params: Params, lam: Hyper, batch: Batch, model_state: PyTree
) -> Any:
    """What the loss returns; an error is explained, `name` being what the user calls it."""
    check_callable(name, loss, "(params, hyperparams, batch) -> scalar")
    arguments = (batch, model_state) if has_model_state(model_state) else (batch,)
    with explain_call(name, loss, params, lam, *arguments):
        return loss(params, lam, *arguments)


def train(loss: LossFn, params: Params, lam: Hyper, batch: Batch, model_state: PyTree) -> Evaluated:
    """The training loss with the model state that it leaves behind.

    Raises:
        TypeError: it returns something else than the table at the head of this module says.

    >>> def loss(w, lam, batch, seen):
    ...     return w * batch, (seen + 1, {"batch": batch})
    >>> train(loss, 2.0, (), 3.0, 0)
    Evaluated(value=6.0, model_state=1, metrics={'batch': 3.0})
    """
    got = _call("train_loss_fn", loss, params, lam, batch, model_state)
    if not has_model_state(model_state):
        value, metrics = _value_and_metrics("train_loss_fn", got)
        return Evaluated(value, model_state, metrics)
    if not _is_pair(got) or not _is_pair(got[1]):
        raise TypeError(
            "with a model state train_loss_fn must return (loss, (model_state, metrics)), the "
            f"model state after the step and a dictionary of scalars, {{}} for none; it returned "
            f"{_outline(got)}."
        )
    value, (after, metrics) = got
    check_scalar("train_loss_fn", value)
    return Evaluated(value, after, _checked("train_loss_fn", metrics))


def judge(
    loss: LossFn, params: Params, lam: Hyper, batch: Batch, model_state: PyTree
) -> tuple[Scalar, MetricDict]:
    """The validation loss and its metrics.

    >>> judge(lambda w, lam, batch: (w * batch, {"w": w}), 2.0, (), 3.0, ())
    (6.0, {'w': 2.0})
    """
    got = _call("val_loss_fn", loss, params, lam, batch, model_state)
    return _value_and_metrics("val_loss_fn", got)


def loss_value(
    loss: LossFn, params: Params, lam: Hyper, batch: Batch, model_state: PyTree = ()
) -> Scalar:
    """The value of a loss of either kind, whatever else it returns.

    >>> loss_value(lambda w, lam, batch: (w * batch, {"w": w}), 2.0, (), 3.0)
    6.0
    """
    got = _call("the loss", loss, params, lam, batch, model_state)
    return got[0] if isinstance(got, tuple) else got


def reported(side: str, value: Scalar, metrics: MetricDict) -> MetricDict:
    """What a loss says, under the names that it has in the metrics of a state.

    >>> reported("val", 0.5, {"accuracy": 0.9})
    {'val_loss': 0.5, 'val_accuracy': 0.9}
    """
    return {f"{side}_loss": value} | {f"{side}_{name}": x for name, x in metrics.items()}


def _value_and_metrics(name: str, got: Any) -> tuple[Scalar, MetricDict]:
    if not isinstance(got, tuple):
        check_scalar(name, got)
        return got, {}
    if not _is_pair(got):
        raise TypeError(
            f"{name} must return a loss or (loss, metrics), metrics a dictionary of scalars; it "
            f"returned {_outline(got)}. A model state that a loss changes is declared by "
            "init(..., model_state=...); then it returns (loss, (model_state, metrics))."
        )
    check_scalar(name, got[0])
    return got[0], _checked(name, got[1])


def _is_pair(got: Any) -> bool:
    return isinstance(got, tuple) and len(got) == 2


def _checked(name: str, metrics: Any) -> MetricDict:
    """A dictionary of real scalars under names of text, none of them that of the loss."""
    if not isinstance(metrics, dict):
        raise TypeError(
            f"the metrics that {name} returns beside the loss must be a dictionary of scalars, "
            f"{{'accuracy': ...}}, not {_outline(metrics)}. A model state that a loss changes is "
            "declared by init(..., model_state=...)."
        )
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise TypeError(f"the metrics of {name} need names of text, but one is {key!r}.")
        if key == "loss":
            raise ValueError(
                f"a metric of {name} is called 'loss', which is the name of the loss itself in the "
                "metrics of the state: give it another name."
            )
        if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
            raise TypeError(f"metric {key!r} of {name} must be a number, but is {_outline(value)}.")
        if jnp.shape(value) != ():
            raise TypeError(
                f"metric {key!r} of {name} must be a scalar, but has shape {jnp.shape(value)}. "
                "Reduce it over the examples, for example with jnp.mean."
            )
        dtype = jnp.result_type(value)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise TypeError(
                f"metric {key!r} of {name} must be a number, but is {dtype}. Make a truth value "
                "one by jnp.float32(...)."
            )
    return metrics


def _outline(got: Any) -> str:
    """The containers and types of a value, for a message."""
    if isinstance(got, (tuple, list)):
        return f"a {type(got).__name__} of ({', '.join(_outline(x) for x in got)})"
    if isinstance(got, dict):
        return "a dictionary"
    return f"shape {jnp.shape(got)}" if isinstance(got, jax.Array) else type(got).__name__
