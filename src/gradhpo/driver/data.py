"""The data of a run, one or more episodes at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.core.problem import Window
from gradhpo.core.source import (
    BatchSource,
    Pool,
    Resident,
    check_pools,
    check_source,
    draw,
    resident,
    stack,
)
from gradhpo.utils.arrays import as_arrays, owned
from gradhpo.utils.settings import check_callable

__all__ = ["Data", "Drawn", "in_one"]

AT_ONCE = 16  # episodes in one call, at most
INDEX_BYTES = 2**19  # of the indices of such a call, at most


class Drawn(NamedTuple):
    """What an episode takes."""

    window: Window | None  # batches or indices; None: they come with the start
    draw: Any  # for `begin`


class Data(NamedTuple):
    """Where an episode takes its batches and its draw from."""

    train: BatchSource | None  # None: the batches come with the start
    val: BatchSource | None
    task: Callable[[], Any] | None = None  # the draw for `begin`; None: a key by the episode
    tasks: int | None = None  # so many draws, stacked

    def check(self, begin: Any) -> None:
        """Sources that fit how an episode begins.

        Raises:
            TypeError: a source is none.
            ValueError: there is no `begin` that a draw, or missing sources, would need.
        """
        if begin is None or self.train is not None or self.val is not None:
            check_source("get_train_batch", self.train)
            check_source("get_val_batch", self.val)
            check_pools(self.train, self.val, begin)
        if self.task is not None:
            check_callable("get_task", self.task, "() -> a task or a PRNG key")
            if begin is None:
                raise ValueError(
                    "get_task= is the draw for begin=, which has not been given: give begin=, a "
                    "function (params, hyperparams, draw) -> gradhpo.Start."
                )

    @property
    def sides(self) -> dict[str, BatchSource | None]:
        """The sources of batches by name."""
        return {"train": self.train, "val": self.val}

    @property
    def resident(self) -> Window:
        """Data sets that stay on the device."""
        return resident(self.train, self.val)

    @property
    def with_start(self) -> bool:
        """Whether the batches, or the rows of them, come with the start of an episode."""
        return self.train is None or isinstance(self.train, Pool)

    def at_once(self, T: int) -> int:
        """How many episodes can go into one call: several where indices say it all."""
        if self.task is not None:
            return 1
        if self.with_start:
            return AT_ONCE
        if not (isinstance(self.train, Resident) and isinstance(self.val, Resident)):
            return 1
        each = T * (self.train.bytes_per_step + self.val.bytes_per_step)
        return max(1, min(AT_ONCE, INDEX_BYTES // each))

    def positions(self) -> dict[str, int | list[int]]:
        """Where the sources stand that can go to any position again, by side."""
        return {
            side: np.asarray(source.position, int).tolist()  # type: ignore[union-attr]
            for side, source in self.sides.items()
            if hasattr(source, "go_to") and getattr(source, "repeats", True)
        }

    def return_to(self, positions: Mapping[str, Any]) -> None:
        """Where sources stood, for those that can go there."""
        now = self.positions()
        for side, position in positions.items():
            if side in now and now[side] != position:
                self.sides[side].go_to(position)  # type: ignore[union-attr]

    def go_on(self, first: int, end: int, T: int, positions: Mapping[str, Any]) -> None:
        """From step `first` to the end of what a run has drawn, in episodes of T steps.

        Sources that know where they stood go there, if all do. Else functions are called, as the
        run has called them, and what they give is left out: they may share what they draw from.
        """
        calls = {**self.sides, "task": self.task}
        if all(side in positions for side, source in calls.items() if callable(source)):
            self.return_to(positions)
        else:
            for step in range(first, end, T):
                self.draw(step, min(T, end - step))

    def draw(self, first: int, T: int | None) -> Drawn:
        """What the episode that begins with inner step `first` takes."""
        task = None
        if self.task is not None and self.tasks is None:
            task = owned(_next(self.task))
        elif self.task is not None:
            task = stack("get_task", [as_arrays(_next(self.task)) for _ in range(self.tasks or 1)])
        if self.with_start or self.train is None or self.val is None or T is None:
            return Drawn(None, task)
        return Drawn(draw(self.train, self.val, first, T), task)


def _next(get_task: Callable[[], Any]) -> Any:
    try:
        return get_task()
    except StopIteration:
        raise ValueError(
            "get_task ran out of tasks: a run asks for one in every episode (tasks= for so many). "
            "Cycle over them, or run fewer episodes."
        ) from None


def in_one(drawn: list[Drawn], room: int) -> Window | None:
    """The windows of several episodes on a new leading axis of that length, zeros at its end."""

    def place(*rows: Any) -> np.ndarray:
        rooms = np.zeros((room, *rows[0].shape), rows[0].dtype)
        np.stack(rows, out=rooms[: len(rows)])
        return rooms

    return jax.tree.map(place, *(each.window for each in drawn))
