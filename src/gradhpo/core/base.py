"""The public interface of every method."""

import abc
from typing import Any

from gradhpo.core.state import BilevelState
from gradhpo.core.types import Batch, Hyper, LossFn, Params, PyTree

__all__ = ["BilevelOptimizer"]


class BilevelOptimizer(abc.ABC):
    """Tunes hyperparameters by hypergradients while the model trains."""

    @abc.abstractmethod
    def init(
        self,
        params: Params,
        hyperparams: Hyper,
        train_batch: Batch | None = None,
        *,
        model_state: PyTree = (),
    ) -> BilevelState:
        """A fresh state. `train_batch` gives the batch shape to methods that keep data,
        `model_state` what the losses carry from step to step."""

    @abc.abstractmethod
    def step(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """One outer update: train on `train_batch`, judge by `val_batch`, move `hyperparams`."""

    @abc.abstractmethod
    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: Batch,
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Hyper:
        """The hypergradient that `step` would apply, the state untouched."""
