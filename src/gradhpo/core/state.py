"""The state of a bilevel run: one immutable pytree."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.dynamics import InnerState
from gradhpo.core.status import Status, status_message
from gradhpo.core.types import Hyper, Memory, MetricDict, OptState, Params, PyTree
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.settings import check_count
from gradhpo.utils.validation import check_hyperparams, check_params, check_same_structure

__all__ = ["METRICS", "BilevelState"]

METRICS = ("train_loss", "val_loss", "hypergrad_norm", "direct_norm", "indirect_norm")
"""Floating-point metrics every method reports; NaN until the first step."""


def _zero() -> Any:
    return np.zeros((), np.int32)


def no_counts() -> Any:
    return np.zeros((max(Status) + 1,), np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BilevelState:
    """Everything a bilevel run carries; a pytree through `jit`, `vmap`, `scan` and checkpoints.

    Attributes:
        params: Model parameters `w`.
        hyperparams: Hyperparameters `lam`, unconstrained.
        inner_opt_state: Slots of the inner optimizer; `()` for an `update_fn`.
        outer_opt_state: Slots of the outer optimizer; `()` for `lr_hyper`.
        step: int32 array: outer updates since `init`, never reset.
        metadata: Scalar metrics: `train_loss` (first batch of the window, before its first step),
            `val_loss` (after its last), `outer_stationarity` (of an outer update with constraints
            or penalties, `|lam - P(prox(lam - h))|`), `hypergrad_norm`, `direct_norm`,
            `indirect_norm`, `status` (see `gradhpo.core.status`), `first_bad_step` (step of the
            first rejection, -1 if none) and `n_rejected`. What the losses return beside their value
            follows as `train_...` and `val_...`, taken at the same points. Keys of your own are
            carried along.
        memory: What the method remembers between updates.
        model_state: Batch statistics, PRNG keys … that the losses carry from step to step.
        phi: Where the episode began, for Reptile; `()` when it is not needed.
        episode: int32 array: episodes that `run` has finished, never reset.
        drawn: int32 array: inner steps that `run` has drawn batches for, the position in the data.
        counts: int32 array: how often every status was the one of an update, by its code; see
            `status_counts`.

    Counters stay at 2**31 - 1 once they are there.
    """

    params: Params
    hyperparams: Hyper
    inner_opt_state: OptState
    outer_opt_state: OptState
    step: jax.Array
    metadata: MetricDict
    memory: Memory = ()
    model_state: PyTree = ()
    phi: Any = ()
    episode: jax.Array = dataclasses.field(default_factory=_zero)
    drawn: jax.Array = dataclasses.field(default_factory=_zero)
    counts: jax.Array = dataclasses.field(default_factory=no_counts)

    @classmethod
    def create(
        cls,
        params: Params,
        hyperparams: Hyper,
        inner_opt_state: OptState = (),
        outer_opt_state: OptState = (),
        **fields: Any,
    ) -> "BilevelState":
        """A state at step 0 with the standard metrics, all unknown (NaN) so far.

        >>> state = BilevelState.create(jnp.zeros(3), jnp.array(0.1))
        >>> int(state.step), sorted(state.metadata)[:2]
        (0, ['direct_norm', 'first_bad_step'])
        """
        metadata = empty_metadata(hyperparams) | dict(fields.pop("metadata", {}))
        return cls(
            params, hyperparams, inner_opt_state, outer_opt_state, _zero(), metadata, **fields
        )

    @property
    def inner(self) -> InnerState:
        """The inner state `s = (w, z)`, as estimators see it."""
        return InnerState(self.params, self.inner_opt_state, self.model_state)

    @property
    def status_counts(self) -> dict[Status, int]:
        """How many updates so far ended with which status; those that never occurred are left out.

        >>> BilevelState.create(jnp.zeros(3), jnp.array(0.1)).status_counts
        {}
        """
        counts = np.asarray(self.counts)
        return {code: int(counts[code]) for code in Status if counts[code]}

    @property
    def status_message(self) -> str:
        """What the status of the last update means, with the remedy.

        >>> BilevelState.create(jnp.zeros(3), jnp.array(0.1)).status_message
        'OK: the step was taken and everything is finite'
        """
        return status_message(int(self.metadata["status"]))

    def update(self, **fields: Any) -> "BilevelState":
        """A copy with some fields replaced; `metadata` is merged, `step` becomes an int32 array.

        Raises:
            TypeError: unknown field, or a leaf of the wrong type; the message names it.
            ValueError: new `params` or `hyperparams` of another structure than the old.

        >>> state = BilevelState.create(jnp.zeros(3), jnp.array(0.1))
        >>> print(state.update(step=3, metadata={"note": 1.0}).get_metric("note"))
        1.0
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(fields) - known):
            raise TypeError(f"BilevelState has no field {unknown[0]!r}; fields are {sorted(known)}")
        for name, check in (("params", check_params), ("hyperparams", check_hyperparams)):
            if name in fields:
                check_same_structure(name, getattr(self, name), fields[name])
                if any(map(_is_value, jax.tree.leaves(fields[name]))):
                    check(fields[name])  # else it is a tree of axes, shardings, names
        for name in ("step", "episode", "drawn"):
            if name in fields:
                fields[name] = jnp.asarray(_counted(name, fields[name]), jnp.int32)
        if "metadata" in fields:
            if not isinstance(fields["metadata"], Mapping):
                raise TypeError(f"metadata is a dictionary of metrics, got {fields['metadata']!r}.")
            fields["metadata"] = {**self.metadata, **fields["metadata"]}
        return dataclasses.replace(self, **fields)

    def get_metric(self, name: str, default: Any = None) -> Any:
        """A metric by name; falls back to a field of the method's memory (`theta` …)."""
        if name in self.metadata:
            return self.metadata[name]
        if isinstance(self.memory, Mapping):
            return self.memory.get(name, default)
        return getattr(self.memory, name, default)


def _is_value(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, float | str)


def _counted(name: str, value: Any) -> Any:
    """A whole number, or an array of one; only what is not traced is looked at."""
    if isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.integer):
        return value
    return check_count(name, value, minimum=0)


def empty_metadata(hyperparams: Hyper, metrics: tuple[str, ...] = ()) -> MetricDict:
    """The metrics before the first step, every leaf of a fixed dtype."""
    unknown = np.full((), np.nan, scalar_dtype(hyperparams))
    metadata: dict[str, Any] = dict.fromkeys(METRICS + metrics, unknown)
    metadata["status"] = np.full((), Status.OK, np.int32)
    metadata["first_bad_step"] = np.full((), -1, np.int32)
    metadata["n_rejected"] = np.zeros((), np.int32)
    return metadata
