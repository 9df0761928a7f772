"""Splits and batches, as arrays of indices or as a callable on the host.

All are functions of a seed: the same seed gives the same data on every machine.
Indices are for windows that stay on the device, where the loss gathers rows
from a resident data set; `batches` is for training loops that take a callable.
"""

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.dataset import check_finite
from gradhpo.datasets.loaders import Endless, from_loader
from gradhpo.utils.settings import check_count

__all__ = ["batches", "epoch_indices", "sample_indices", "split"]


def split(batch: Sequence, sizes: Sequence[int], seed: int) -> tuple[DataBatch, ...]:
    """Split a batch into disjoint shuffled parts.

    Args:
        batch: `(inputs, targets)`, both with the N examples leading.
        sizes: Number of examples of each part; rows beyond their sum are left out.
        seed: Decides the shuffle.

    Returns:
        One `DataBatch` of numpy arrays per size.

    Raises:
        ValueError: sizes not positive or adding up to more than N, inputs and
            targets of different lengths, or values that are not finite.

    Warns:
        UserWarning: identical rows of inputs occur in two parts, so that a
            validation part would hold training examples.

    >>> train, val = split((np.arange(10), np.arange(10) % 2), (6, 3), seed=0)
    >>> train.inputs.shape, val.inputs.shape, set(train.inputs) & set(val.inputs)
    ((6,), (3,), set())
    """
    data = _checked(batch)
    total = len(data.targets)
    if not sizes or min(sizes) < 1 or sum(sizes) > total:
        raise ValueError(f"sizes must be positive and add up to at most {total}, got {[*sizes]}.")
    order = np.random.default_rng(seed).permutation(total)[: sum(sizes)]
    rows = np.split(order, np.cumsum(sizes)[:-1])
    parts = tuple(DataBatch(data.inputs[r], data.targets[r]) for r in rows)
    _warn_of_overlap(parts)
    return parts


def epoch_indices(seed: int, num_examples: int, batch_size: int, epoch: int = 0) -> np.ndarray:
    """One shuffled pass through the data; a last partial batch is dropped.

    Returns:
        int32 (num_examples // batch_size, batch_size). Row b is batch b.

    Raises:
        ValueError: no examples, or fewer than a batch.

    >>> epoch_indices(seed=0, num_examples=7, batch_size=3).shape
    (2, 3)
    """
    steps = _check_sizes(num_examples, batch_size, replace=False)
    order = _order(seed, num_examples, epoch)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def sample_indices(
    seed: int, num_examples: int, batch_size: int, steps: int, *, replace: bool = False
) -> np.ndarray:
    """Indices of the examples of many batches.

    Args:
        seed: Decides the order.
        num_examples: N; indices lie in [0, N).
        batch_size: Examples per batch.
        steps: Number of batches.
        replace: If True every index is drawn independently and uniformly. If
            False batches are those of `epoch_indices` for epochs 0, 1, ..., so
            that no example repeats within an epoch.

    Returns:
        int32 (steps, batch_size), ready for `jax.lax.scan`.

    Raises:
        ValueError: no examples or steps, or fewer examples than a batch when
            `replace` is False.

    >>> sample_indices(seed=0, num_examples=5, batch_size=2, steps=4).shape
    (4, 2)
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}.")
    per_epoch = _check_sizes(num_examples, batch_size, replace)
    if replace:
        return np.random.default_rng(seed).integers(
            num_examples, size=(steps, batch_size), dtype=np.int32
        )
    epochs = range(-(-steps // per_epoch))
    passes = [epoch_indices(seed, num_examples, batch_size, epoch) for epoch in epochs]
    return np.concatenate(passes)[:steps]


def batches(
    data: Sequence,
    batch_size: int,
    seed: int,
    start: int | tuple[int, int] = 0,
    *,
    pad: bool = False,
) -> Endless:
    """An endless source of batches, for `get_train_batch` and `get_val_batch`.

    Every epoch is a new shuffle. Shapes never change, so that nothing compiles twice.

    Args:
        data: `(inputs, targets)`, both with the N examples leading.
        batch_size: Examples per batch.
        seed: Decides the order: batch k is row k of `sample_indices`.
        start: Number of the first batch, or the `position` of an earlier source, to go on after an
            interruption.
        pad: What happens to a last partial batch of an epoch. False: it is left out. True: it is
            filled up, so that every example counts once per epoch.

    Returns:
        `next_batch()`, which returns a `DataBatch` of numpy arrays, with `pad` a
        `Masked(DataBatch, mask)`. Its `position` is where it stands.

    Raises:
        ValueError: at once, for empty data, inputs and targets of different
            lengths, fewer examples than a batch, or values that are not finite.

    >>> next_batch = batches((np.arange(5.0), np.arange(5)), batch_size=2, seed=0)
    >>> next_batch().inputs.shape
    (2,)
    """
    arrays = _checked(data)
    total = len(arrays.targets)
    per_epoch = _check_sizes(total, batch_size, replace=False)
    if pad:
        per_epoch = -(-total // batch_size)
    if not isinstance(start, tuple | list):
        start = divmod(check_count("start", start, minimum=0), per_epoch)

    shuffles = functools.partial(_epoch, arrays, batch_size, seed)
    return from_loader(shuffles, pad=pad, start=start)


def _epoch(data: DataBatch, batch_size: int, seed: int, epoch: int) -> Iterator[DataBatch]:
    total = len(data.targets)
    order = _order(seed, total, epoch)
    for first in range(0, total, batch_size):
        rows = order[first : first + batch_size]
        yield DataBatch(data.inputs[rows], data.targets[rows])


def _order(seed: int, num_examples: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _checked(batch: Sequence) -> DataBatch:
    inputs, targets = (np.asarray(part) for part in batch)
    if inputs.shape[:1] != targets.shape[:1] or not inputs.ndim or not len(inputs):
        raise ValueError(
            "inputs and targets need the same number of examples, at least one, on the leading "
            f"axis; got shapes {inputs.shape} and {targets.shape}."
        )
    check_finite((inputs, targets))
    return DataBatch(inputs, targets)


def _check_sizes(num_examples: int, batch_size: int, replace: bool) -> int:
    if num_examples < 1 or batch_size < 1 or (batch_size > num_examples and not replace):
        raise ValueError(
            f"A batch of {batch_size} cannot be drawn from {num_examples} examples"
            f"{'' if replace else ' without replacement'}."
        )
    return num_examples // batch_size


def _warn_of_overlap(parts: Sequence[DataBatch]) -> None:
    owners: dict[bytes, int] = {}
    shared = [0] * len(parts)
    for number, part in enumerate(parts):
        for row in part.inputs:
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            shared[number] += owners.setdefault(digest, number) != number
    if any(shared):
        counts = ", ".join(f"{n} rows of part {i}" for i, n in enumerate(shared) if n)
        warnings.warn(
            f"{counts} have inputs identical to a row of an earlier part: the parts overlap. "
            "Duplicates in the data are the usual cause; remove them before splitting.",
            stacklevel=3,
        )
