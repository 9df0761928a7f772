"""MNIST and Fashion-MNIST, and the idx format both come in.

The format (LeCun): two zero bytes, a type code (8 is uint8), the number of
dimensions, each dimension as a big-endian uint32, then the values in C order.
"""

import math
import struct
from os import PathLike
from pathlib import PurePosixPath

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.class_folders import from_class_folders, is_image
from gradhpo.datasets.dataset import Dataset, DatasetError, check_labels, scale_pixels
from gradhpo.datasets.download import Remote
from gradhpo.datasets.sources import Contents, by_key, find, read

__all__ = ["fashion_mnist", "mnist", "parse_idx"]

# SHA-256 as published by TensorFlow Datasets, and of the files read in our tests; bytes.
_MNIST = {
    "train-images-idx3-ubyte.gz":
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9_912_422),
    "train-labels-idx1-ubyte.gz":
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28_881),
    "t10k-images-idx3-ubyte.gz":
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1_648_877),
    "t10k-labels-idx1-ubyte.gz":
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4_542),
}  # fmt: skip
_FASHION = {
    "train-images-idx3-ubyte.gz":
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
    "train-labels-idx1-ubyte.gz":
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
    "t10k-images-idx3-ubyte.gz":
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
    "t10k-labels-idx1-ubyte.gz":
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
}  # fmt: skip
_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CLASSES = 10


def parse_idx(data: bytes, name: str = "idx data") -> np.ndarray:
    """Read uint8 idx bytes into an array (a read-only view of them).

    Raises:
        DatasetError: not idx, not uint8, or the declared shape does not fit
            the bytes present; nothing is allocated before that check.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
    array([5, 7], dtype=uint8)
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DatasetError(f"{name} is not an idx file of uint8; it starts with {data[:8]!r}.")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if math.prod(shape) != len(data) - start or 0 in shape or not shape:
        raise DatasetError(
            f"{name} declares shape {shape}, which is {math.prod(shape)} bytes, "
            f"but holds {len(data) - start}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def mnist(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """MNIST: handwritten digits, 60,000 + 10,000 images of shape (28, 28, 1).

    Args:
        data_dir: See `gradhpo.datasets.load`. `<data_dir>/mnist/` may hold the
            four official idx files, plain or compressed (gz, bz2, xz), an
            archive or folder with them, or class folders
            `<split>/<class>/*.png`.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest.

    Source:
        LeCun, Cortes and Burges (1998), "The MNIST database".
    """
    return _load("mnist", data_dir, [Remote(_MNIST_URL + f, *known) for f, known in _MNIST.items()])


def fashion_mnist(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """Fashion-MNIST: articles of clothing, in the format and sizes of `mnist`.

    Args:
        data_dir: See `mnist`; the folder is `fashion_mnist` or `fashion-mnist`.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest.

    Source:
        Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST".
    """
    remotes = [Remote(_FASHION_URL + f, *known) for f, known in _FASHION.items()]
    return _load("fashion_mnist", data_dir, remotes)


def _load(name: str, data_dir: str | PathLike[str] | None, remotes: list[Remote]) -> Dataset:
    contents = read(find(name, data_dir, remotes), lambda p: _is_idx(p) or is_image(p))
    if not any(map(_is_idx, contents.entries)):
        return from_class_folders(name, contents)
    train = _split(contents, "train")
    if train is None:
        raise DatasetError(f"{name}: train-images-idx3-ubyte or its labels are missing.")
    return Dataset(name, train, _split(contents, "t10k"), _CLASSES, contents.files)


def _is_idx(path: PurePosixPath) -> bool:
    return path.name.endswith("-ubyte") and path.name.startswith(("train-", "t10k-"))


def _split(contents: Contents, part: str) -> DataBatch | None:
    named = by_key(
        (p for p in contents.entries if _is_idx(p) and p.name.startswith(part)), lambda p: p.name
    )
    if not named:
        return None
    pair = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    if set(pair) - set(named):
        raise DatasetError(f"Of {' and '.join(pair)} only {[*named]} was found.")
    images, labels = (parse_idx(contents.entries[named[name]], name) for name in pair)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DatasetError(f"{part}: images {images.shape} do not fit labels {labels.shape}.")
    return DataBatch(scale_pixels(images[..., None]), check_labels(labels, _CLASSES, part))
