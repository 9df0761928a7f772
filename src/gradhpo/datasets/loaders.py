"""Any loader as a source of batches: endless, of one size, with a position to go on from.

A loader is what gives the batches of one epoch: PyTorch's `DataLoader`, a `tf.data.Dataset`, a
data set of grain, a list, or a function that makes an iterator. None of their packages is
imported: what they give is turned into NumPy arrays.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.core.types import Batch
from gradhpo.utils.arrays import as_arrays
from gradhpo.utils.settings import check_count

__all__ = ["Endless", "Masked", "Position", "from_loader"]


class Masked(NamedTuple):
    """A batch that was filled up to its size, and which of its examples count.

    A loss is a mean over those: `jnp.mean(losses, where=mask)`. The others are copies of the first
    example, whose loss and derivatives are as finite as its own; zeros might not be.
    """

    batch: Any
    mask: Any  # bool (batch_size,)


class Position(NamedTuple):
    """Where a source stands. Two integers: any file can keep them."""

    epoch: int  # from 0
    batch: int  # the one of this epoch that comes next, from 0


class Endless:
    """A source of batches that begins the next epoch when one has ended; call it for a batch.

    Made by `batches` and `from_loader`. In a callback of a run, and after the run, `position` is
    that of its state: with both a run goes on as if it had not been cut.
    """

    def __init__(self, loader: Any, pad: bool, start: int | tuple[int, int]):
        self._loader, self._pad = loader, pad
        self._function = callable(loader) and not hasattr(loader, "__iter__")
        if _is_data(loader):
            raise TypeError(
                f"a loader gives batches in a for loop, but {type(loader).__name__} holds data: "
                "datasets.batches((inputs, targets), batch_size, seed) makes batches of it."
            )
        if not self._function and not hasattr(loader, "__iter__"):
            raise TypeError(
                f"a loader gives batches in a for loop, but {type(loader).__name__} has no "
                "__iter__: give a DataLoader or the like, a list of batches, or a function that "
                "makes an iterator."
            )
        self._numbered = self._function and _takes_a_number(loader)
        self._iterator: Iterator[Any] | None = None
        self._size: int | None = None  # of a batch: that of the first one
        self._failed = False  # the last call ended in an error of the loader
        self._once = False  # the loader is an iterator itself, which cannot begin again
        self._position = Position(0, 0)
        self.go_to(start)

    @property
    def position(self) -> Position:
        """Of the batch that comes next."""
        return self._position

    @property
    def repeats(self) -> bool:
        """Whether every epoch can be had again: of a list, or a function of the number of the
        epoch. Shuffles that follow one another cannot."""
        return self._numbered or isinstance(self._loader, list | tuple)

    def go_to(self, position: int | tuple[int, int]) -> None:
        """Go on from there; what lies before is read and left out.

        That is this epoch where the loader is a function of the epoch; otherwise all from here on,
        and, for a position behind, all from the first: a loader that draws its shuffles one after
        the other then has to be a new one.

        Args:
            position: As `position` was, or how many batches have been taken.

        Raises:
            ValueError: no epoch of the loader has this batch, or the loader is an iterator that has
                begun.
        """
        if np.ndim(position) == 0:
            self._restart()
            for _ in range(check_count("start", position, minimum=0)):
                self()
            return
        if np.shape(position) != (2,):
            raise ValueError(f"a position is (epoch, batch), got {position!r}.")
        wanted = Position(*(check_count("a position", x, minimum=0) for x in np.asarray(position)))
        jumps = self._numbered and wanted.epoch != self._position.epoch
        if jumps or self._failed or wanted < self._position:
            self._restart()
            if self._numbered:
                self._position = Position(wanted.epoch, 0)
        while self._position < wanted:
            self._step()
        if self._position != wanted:
            raise ValueError(
                f"the loader has no batch {wanted.batch} in epoch {wanted.epoch}: it is not the "
                "one, or not with the batch size, that this position is of."
            )

    def _restart(self) -> None:
        if self._once:
            raise ValueError(f"the loader is an iterator, {_REMEDY}")
        self._iterator, self._position, self._failed = None, Position(0, 0), False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, and what is pickled, is made anew of the loader and goes to this position."""
        begun = self._iterator is not None or self._position != Position(0, 0)
        if begun and not self.repeats:
            raise TypeError(
                f"a source of {type(self._loader).__name__} that has begun cannot be copied or "
                "pickled, because its loader may not give the same batches again. Keep its "
                f"position, {tuple(self._position)}, and make it anew, from_loader(loader, "
                "start=position); or let the loader be a function of the epoch."
            )
        return Endless, (self._loader, self._pad, tuple(self._position))

    def __call__(self) -> Batch:
        """The next batch: what the loader gives, as arrays; with `pad` a `Masked`.

        Raises:
            ValueError: the loader is empty or cannot begin again, or a batch is larger than the
                first one, or smaller and not the last of an epoch.
        """
        while (batch := self._step()) is _END:
            pass
        return batch

    def _step(self) -> Any:
        """The next batch, or `_END` of an epoch."""
        if self._iterator is None:
            self._iterator = self._epoch()
        failed, self._failed = self._failed, True  # until this call has ended well
        batch = next(self._iterator, _END)
        if batch is _END and failed:
            epoch, number = self._position
            raise ValueError(
                f"the loader failed at batch {number} of epoch {epoch}, and gives no more of this "
                f"epoch: mend it, and go on with go_to({tuple(self._position)})."
            )
        if batch is not _END:
            try:
                batch = self._sized(as_arrays(batch))
            except BaseException:
                self._iterator = iter(())  # what it has given is lost: nobody is to pass it over
                raise
        self._failed = False
        if batch is _END:
            self._end_epoch()
        else:
            self._position = self._position._replace(batch=self._position.batch + 1)
        return batch

    def _epoch(self) -> Iterator[Any]:
        made: Iterable[Any] = self._loader
        if self._function:
            made = self._loader(self._position.epoch) if self._numbered else self._loader()
        iterator = iter(made)
        self._once = iterator is self._loader
        return iterator

    def _end_epoch(self) -> None:
        epoch, batch = self._position
        if self._once:
            raise ValueError(
                f"the loader is an iterator that ended after {batch} batches, {_REMEDY}"
            )
        if not batch:
            raise ValueError(
                f"the loader has no batch in epoch {epoch}: it is empty, or it is a function that "
                "returns the same iterator again, and has to make another one at every call."
            )
        self._iterator, self._position = None, Position(epoch + 1, 0)

    def _sized(self, batch: Batch) -> Any:
        """The batch, filled up; `_END`: it is the last of its epoch, too small, and left out."""
        sizes = {np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)}
        size = sizes.pop() if len(sizes) == 1 else None
        where = f"batch {self._position.batch} of epoch {self._position.epoch}"
        if size is None:
            if self._pad:
                raise ValueError(
                    f"pad=True fills up examples, but the arrays of {where} share no leading axis: "
                    f"{[np.shape(x) for x in jax.tree.leaves(batch)]}."
                )
            return batch
        if not size:
            raise ValueError(f"{where} has no examples: leave such batches out of the loader.")
        self._size = wanted = self._size or size
        if size > wanted:
            raise ValueError(
                f"{where} has {size} examples, but the first one had {wanted}, and shapes must not "
                "change: give a loader whose batches are of one size, but for the last of an epoch."
            )
        if self._pad:
            return _filled(batch, size, wanted)
        if size == wanted:
            return batch
        assert self._iterator is not None
        if next(self._iterator, _END) is not _END:
            raise ValueError(
                f"{where} has {size} examples, the first one had {wanted}, and it is not the last "
                "of its epoch, which alone is left out: fill such batches up with pad=True."
            )
        return _END


_END = object()
_REMEDY = (
    "and an iterator cannot begin again: give what it comes from, the loader itself or a function "
    "that makes it, as in from_loader(make) in the place of from_loader(make())."
)


def from_loader(
    loader: Iterable[Any] | Callable[..., Iterable[Any]],
    *,
    pad: bool = False,
    start: int | tuple[int, int] = 0,
) -> Endless:
    """A source of batches, for `get_train_batch`, `get_val_batch` and `gradhpo.Task`.

    Args:
        loader: What gives the batches of an epoch in a `for` loop, as often as one asks; or a
            function that makes such a thing for every epoch, of no argument or of the number of
            the epoch, from 0 (a parameter without a default, or called `epoch`). A batch is any
            tree of arrays; tensors on the host become NumPy arrays of the same dtype.
        pad: What happens to a last batch that is smaller than the first one. False: it is left
            out. True: it is filled up, and every batch is a `Masked`.
        start: Where to begin: the `position` of an earlier source, or how many batches were taken.

    Shuffles are the loader's. It gives the same batches in another training, and after `start`,
    if they are a function of a seed that the loader is made with, or of the number of the epoch;
    not if they come from a generator that all of the program shares.

    Returns:
        A function of no argument, see `Endless`. To read ahead is left to the loader.

    Raises:
        TypeError: no loader.
        ValueError: when a batch is asked for, see `Endless`.

    >>> source = from_loader([(np.ones(3), np.ones(3)), (np.ones(2), np.ones(2))], pad=True)
    >>> [source().mask.sum().item() for _ in range(3)], source.position
    ([3, 2, 3], Position(epoch=1, batch=1))
    """
    return Endless(loader, pad, start)


def _filled(batch: Batch, size: int, wanted: int) -> Masked:
    mask = np.arange(wanted) < size
    if size == wanted:
        return Masked(batch, mask)
    rows = np.where(mask, np.arange(wanted), 0)
    return Masked(jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, batch), mask)


def _takes_a_number(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a built-in function nothing may be known
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(
        p.kind in by_position and (p.default is p.empty or p.name == "epoch") for p in parameters
    )


def _is_data(loader: Any) -> bool:
    """An array, a tree of arrays or a string; a list of arrays is a list of batches."""
    if isinstance(loader, tuple):
        return any(hasattr(x, "shape") for x in loader)
    return isinstance(loader, Mapping | str) or hasattr(loader, "shape")
