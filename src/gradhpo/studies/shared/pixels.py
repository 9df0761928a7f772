"""Labelled sets of images as bytes, by name or from a folder, shrunk where asked for."""

from dataclasses import replace
from os import PathLike

import numpy as np

from gradhpo import datasets
from gradhpo.core.types import DataBatch

__all__ = ["load_pixels", "shrunk"]


def load_pixels(
    dataset: str, data_dir: str | PathLike[str] | None = None, side: int = 0
) -> datasets.Dataset:
    """A data set whose images are uint8, (n, height, width, channels).

    Args:
        dataset: A name known to `gradhpo.datasets`, or the path of a folder of class folders.
        data_dir: Where to look for a set of that name.
        side: As of `shrunk`.

    Raises:
        DatasetError: no such folder, and no such name.

    >>> load_pixels("digits", side=4).train.inputs.shape
    (1797, 4, 4, 1)
    """
    if dataset.replace("-", "_") in datasets.available():
        data = datasets.load(dataset, data_dir)
    else:
        data = datasets.image_folder(dataset)

    def part(batch: DataBatch | None) -> DataBatch | None:
        if batch is None:
            return None
        pixels = batch.inputs
        if pixels.dtype != np.uint8:
            pixels = np.round(pixels * 255).astype(np.uint8)
        return DataBatch(shrunk(pixels, side), batch.targets)

    train = part(data.train)
    assert train is not None
    return replace(data, train=train, test=part(data.test))


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """Images of `side` pixels, each the mean of a square; 0 leaves them as they are.

    Raises:
        ValueError: `side` does not divide that of the images.

    >>> shrunk(np.array([[0, 2], [4, 6]], np.uint8).reshape(1, 2, 2, 1), 1).ravel()
    array([3], dtype=uint8)
    """
    n, height, width, channels = pixels.shape
    if side in (0, height):
        return pixels
    if height != width or height % side:
        raise ValueError(f"side={side} does not divide images of {height} x {width} pixels.")
    parts = pixels.reshape(n, side, height // side, side, height // side, channels)
    return np.round(parts.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
