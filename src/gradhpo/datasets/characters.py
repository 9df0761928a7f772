"""Omniglot: handwritten characters, for few-shot tasks."""

import re
from os import PathLike
from pathlib import PurePosixPath

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.class_folders import decode_image
from gradhpo.datasets.dataset import Dataset, DatasetError, scale_pixels
from gradhpo.datasets.download import Remote
from gradhpo.datasets.sources import Contents, by_key, find, read

__all__ = ["omniglot"]

# SHA-256 as published by TensorFlow Datasets.
_URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
_REMOTES = (
    Remote(
        _URL + "images_background.zip",
        "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    ),
    Remote(
        _URL + "images_evaluation.zip",
        "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    ),
)
_SETS = "images_background", "images_evaluation"
_PATH = re.compile(rf"(?:^|/)({'|'.join(_SETS)})/([^/]+)/([^/]+)/\d+_(\d+)\.png$")


def omniglot(data_dir: str | PathLike[str] | None = None, size: int | None = 28) -> Dataset:
    """Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people.

    Args:
        data_dir: See `gradhpo.datasets.load`. `<data_dir>/omniglot/` holds the
            official tree `images_background/<Alphabet>/characterNN/NNNN_DD.png`
            and `images_evaluation/...`, as folders or in archives.
        size: Side of the square images, reduced by a Lanczos filter; None
            keeps the 105 pixels of the files (0.85 GB for the background set).

    Returns:
        `train` is the background set, `test` the evaluation set (None if
        absent). Inputs are float32 (characters, drawers, size, size) in [0, 1],
        ink 0 on paper 1 as in the files: a class is a row, and drawing
        `x[c, d]` is by drawer d + 1. Targets are int32 (characters,): the
        alphabet of each character, an index into `class_names`, background
        alphabets first, each part in alphabetical order. `num_classes` is the
        number of alphabets.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest, or
            characters drawn by different numbers of people.
        ValueError: `size` is not positive.

    Source:
        Lake, Salakhutdinov and Tenenbaum (2015), "Human-level concept learning
        through probabilistic program induction". Resized to 28 as in Vinyals
        et al. (2016), "Matching Networks"; rotations are left to the caller.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be positive or None, got {size}.")
    contents = read(find("omniglot", data_dir, _REMOTES), lambda p: bool(_PATH.search(str(p))))
    index = by_key(sorted(contents.entries), _fields)
    train, test = (_batch(contents, index, part, size) for part in _SETS)
    if train is None:
        raise DatasetError(
            f"Omniglot has no {_SETS[0]}/<Alphabet>/characterNN/NNNN_DD.png in {[*contents.files]}."
        )
    (inputs, alphabets), names = train
    evaluation = None
    if test is not None:
        evaluation = DataBatch(test[0].inputs, test[0].targets + np.int32(len(names)))
        names = names + test[1]
    batch = DataBatch(inputs, alphabets)
    return Dataset("omniglot", batch, evaluation, len(names), contents.files, class_names=names)


def _fields(path: PurePosixPath) -> tuple[str, str, str, int]:
    match = _PATH.search(str(path))
    assert match is not None  # only such paths were read
    part, alphabet, character, drawer = match.groups()
    return part, alphabet, character, int(drawer)


def _batch(
    contents: Contents, index: dict, part: str, size: int | None
) -> tuple[DataBatch, tuple[str, ...]] | None:
    keys = sorted(key for key in index if key[0] == part)
    if not keys:
        return None
    characters = sorted({key[1:3] for key in keys})
    drawers = sorted({key[3] for key in keys})
    if len(keys) != len(characters) * len(drawers):
        lone = next(c for c in characters if any((part, *c, d) not in index for d in drawers))
        raise DatasetError(f"{part}: character {lone} lacks some of the drawers {drawers}.")
    images = [
        decode_image(contents.entries[index[key]], str(index[key]), size, "L")[..., 0]
        for key in keys
    ]
    odd = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
    if odd is not None:
        raise DatasetError(
            f"{index[keys[odd]]} has shape {images[odd].shape}, the first {images[0].shape}."
        )
    stacked = scale_pixels(np.stack(images))
    names = tuple(sorted({alphabet for alphabet, _ in characters}))
    targets = np.array([names.index(alphabet) for alphabet, _ in characters], np.int32)
    shape = len(characters), len(drawers), *stacked.shape[1:]
    return DataBatch(stacked.reshape(shape), targets), names
