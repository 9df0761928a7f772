"""Where NaN came from, if it came with the batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.problem import Window
from gradhpo.core.source import InOrder, on_host
from gradhpo.driver.data import Data
from gradhpo.utils.validation import leaves_with_names, nonfinite_rows

__all__ = ["Spoilt"]


class Spoilt:
    """The first value that is not finite among the batches of a run.

    Data sets that stay on the device were looked through when they were given. What functions and
    loaders make, and `InOrder` holds, is looked at on the host when an episode has been launched;
    that takes as long as the copy that was made of it. Batches that are on an accelerator are not
    fetched for it.
    """

    def __init__(self, data: Data):
        self.sources = {"get_train_batch": data.train, "get_val_batch": data.val}
        self.said = ""

    def look(self, window: Window | None, episode: int) -> None:
        """At the batches of an episode, counted from 1; nothing once something has been found."""
        if window is None or self.said:
            return
        for (name, source), batches in zip(self.sources.items(), window, strict=True):
            if isinstance(source, InOrder) or callable(source):
                self.said = self.said or _first(name, batches, episode)


def _first(source: str, batches: Any, episode: int) -> str:
    for name, values in leaves_with_names(batches):
        if isinstance(values, jax.Array) and not on_host(values):
            continue
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            continue
        values = np.asarray(values)
        if bad := nonfinite_rows(values):
            step, *index = bad[0]
            where = f" at index {tuple(index)}" if index else ""
            return (
                f"the first value of a batch that is not finite is {values[bad[0]]}{where} of "
                f"leaf {name}, {source}, batch {step + 1} of episode {episode}"
            )
    return ""
