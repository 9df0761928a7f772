"""Names for the things that pass between modules.

Shapes are in `docs/notation.md`; every alias here is a pytree or a callable, so
plain dictionaries, tuples and functions are accepted wherever one is named.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

__all__ = [
    "Batch",
    "DataBatch",
    "Hyper",
    "InnerOptimizer",
    "Loop",
    "LossFn",
    "LossFunctions",
    "MakeOptimizer",
    "Memory",
    "MetricDict",
    "OptState",
    "Params",
    "PyTree",
    "Scalar",
    "UpdateFn",
]

PyTree: TypeAlias = Any
"""Any nesting of dictionaries, tuples, dataclasses … with arrays at the leaves."""

Params: TypeAlias = PyTree
"""Model parameters `w`. Integer and key leaves are carried, never differentiated."""

Hyper: TypeAlias = PyTree
"""Hyperparameters `lam`, unconstrained; every leaf is floating point."""

Batch: TypeAlias = PyTree
"""One batch `D_t` or `V_t`: whatever the losses take as their last argument."""

OptState: TypeAlias = PyTree
"""Optimizer slots `z` (velocity, moments, counts)."""

Memory: TypeAlias = PyTree
"""What an estimator carries from one outer update to the next."""

Scalar: TypeAlias = jax.Array
"""A floating-point array of shape ()."""

MetricDict: TypeAlias = dict[str, jax.Array]
"""Scalar metrics by name."""

Loop: TypeAlias = str
"""How a loop over steps runs: "scan" (one compiled loop), "unroll" (compiled, no loop) or
"host" (a Python loop over one compiled step). The numbers are the same."""

LossFn: TypeAlias = Callable[..., Any]
"""`loss(params, hyperparams, batch)`, a floating-point scalar. It may return metrics beside the
scalar and carry a model state, see `gradhpo.core.losses`."""

UpdateFn: TypeAlias = Callable[..., Any]
"""`update_fn(params, hyperparams, batch) -> params`, one training step written by the user; with a
model state `update_fn(params, hyperparams, batch, model_state) -> (params, model_state)`."""


class InnerOptimizer(Protocol):
    """An Optax optimizer, or one of `gradhpo.transforms` that can tell more about itself."""

    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...


MakeOptimizer: TypeAlias = Callable[[Hyper], InnerOptimizer]
"""`hyperparams -> optimizer`, called inside the traced step."""


class DataBatch(NamedTuple):
    """Inputs and targets with a shared leading axis; plain tuples do as well."""

    inputs: Any
    targets: Any


class LossFunctions(NamedTuple):
    """The two losses of a bilevel problem."""

    train: LossFn
    val: LossFn
