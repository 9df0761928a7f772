"""CIFAR-10 and CIFAR-100, from the official binary records or class folders.

A record is one label byte (CIFAR-100: a coarse, then a fine label) and 3072
bytes of pixels: 32x32 of red, of green, of blue, row by row. The official
Python version is a pickle and is never read.
"""

from os import PathLike
from pathlib import PurePosixPath

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.class_folders import from_class_folders, is_image
from gradhpo.datasets.dataset import Dataset, DatasetError, check_labels, scale_pixels
from gradhpo.datasets.download import Remote
from gradhpo.datasets.sources import Contents, by_key, find, read

__all__ = ["cifar10", "cifar100", "parse_records"]

# SHA-256 and bytes as published by TensorFlow Datasets.
_CIFAR10 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170_052_171,
)
_CIFAR100 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    168_513_733,
)
_SHAPE = 3, 32, 32
_CLASS_NAMES = ("batches.meta.txt", "fine_label_names.txt")


def cifar10(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """CIFAR-10: colour photographs in 10 classes, shape (32, 32, 3).

    Args:
        data_dir: See `gradhpo.datasets.load`. `<data_dir>/cifar10/` may hold
            the official `cifar-10-binary.tar.gz` under any name, its
            `data_batch_*.bin` and `test_batch.bin`, plain or compressed, or
            class folders `<split>/<class>/*.jpg` or `.png`, plain or in an
            archive. Subsets are fine.

    Returns:
        As many examples as the files hold (officially 50,000 + 10,000); `test`
        is None if there is no test file or folder.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest.

    Source:
        Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images".
    """
    return _load("cifar10", data_dir, _CIFAR10, label_bytes=1, num_classes=10)


def cifar100(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """CIFAR-100: as `cifar10`, in 100 classes; labels are the fine labels.

    Args:
        data_dir: See `cifar10`; the official files are `train.bin`, `test.bin`.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest.

    Source:
        Krizhevsky (2009), as `cifar10`.
    """
    return _load("cifar100", data_dir, _CIFAR100, label_bytes=2, num_classes=100)


def parse_records(data: bytes, label_bytes: int, name: str = "data") -> DataBatch:
    """Read CIFAR records into uint8 images (N, 32, 32, 3) and labels (N,).

    Raises:
        DatasetError: the bytes are not a whole number of records.

    >>> images, labels = parse_records(bytes([3]) + bytes(3072), label_bytes=1)
    >>> images.shape, int(labels[0])
    ((1, 32, 32, 3), 3)
    """
    record = label_bytes + 3072
    if not data or len(data) % record:
        raise DatasetError(f"{name} has {len(data)} bytes, not a multiple of {record}.")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    images = records[:, label_bytes:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    return DataBatch(images, records[:, label_bytes - 1])


def _wanted(path: PurePosixPath) -> bool:
    return path.suffix == ".bin" or path.name in _CLASS_NAMES or is_image(path)


def _load(name, data_dir, remote: Remote, label_bytes: int, num_classes: int) -> Dataset:
    contents = read(find(name, data_dir, [remote]), _wanted)
    bins = [p for p in contents.entries if p.suffix == ".bin"]
    bins = sorted(by_key(bins, lambda p: p.name).values())
    if not bins:
        return from_class_folders(name, contents)
    train, test = (
        _batch(contents, [p for p in bins if ("test" in p.name) == is_test], label_bytes)
        for is_test in (False, True)
    )
    if train is None:
        raise DatasetError(f"{name}: only test records were found: {', '.join(map(str, bins))}.")
    for split, batch in (("train", train), ("test", test)):
        if batch is not None:
            check_labels(batch.targets, num_classes, f"{name} {split}")
    return Dataset(name, train, test, num_classes, contents.files, class_names=_names(contents))


def _batch(contents: Contents, paths: list[PurePosixPath], label_bytes: int) -> DataBatch | None:
    if not paths:
        return None
    parts = [parse_records(contents.entries[p], label_bytes, str(p)) for p in paths]
    images = scale_pixels(np.concatenate([part.inputs for part in parts]))
    labels = np.concatenate([part.targets for part in parts])
    return DataBatch(images, labels.astype(np.int32))


def _names(contents: Contents) -> tuple[str, ...]:
    found = [data for p, data in contents.entries.items() if p.name in _CLASS_NAMES]
    return tuple(found[0].decode("utf-8", "replace").split()) if found else ()
