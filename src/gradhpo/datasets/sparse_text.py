"""ijcnn1 and a9a: binary classification, in the sparse text of LIBSVM.

A line is `label index:value ...` with indices from 1. Labels -1 and 1 become
classes 0 and 1; features become dense.
"""

import io
from os import PathLike

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.archives import LIMIT
from gradhpo.datasets.dataset import Dataset, DatasetError, check_finite
from gradhpo.datasets.download import Remote, require
from gradhpo.datasets.sources import Contents, by_key, find, read

__all__ = ["a9a", "ijcnn1", "parse_libsvm"]

_URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
# The publisher of a9a gives no SHA-256. These are the digests of two independent
# copies, and agree with the MD5 in an R package for LIBSVM data.
_A9A = (
    Remote(
        _URL + "a9a",
        "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906",
        2_329_875,
    ),
    Remote(
        _URL + "a9a.t",
        "1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9",
        1_164_628,
    ),
)
_IJCNN1 = (Remote(_URL + "ijcnn1.bz2", None), Remote(_URL + "ijcnn1.t.bz2", None))
_IJCNN1_TRAIN = 35_000  # lines of ijcnn1.tr, which `ijcnn1` begins with; the rest is ijcnn1.val


def a9a(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """a9a: income above 50K from 123 binary features, 32,561 + 16,281 examples.

    Args:
        data_dir: See `gradhpo.datasets.load`. `<data_dir>/a9a/` holds `a9a` and
            `a9a.t`, plain or compressed (gz, bz2, xz), or an archive of them.

    Returns:
        Inputs float32 (N, 123), labels int32: 1 is the file's +1. `test` is
        None without `a9a.t`.

    Raises:
        DatasetError: files missing, damaged or of the wrong digest.

    Source:
        UCI Adult in the encoding of Platt (1998), from the LIBSVM data page.
    """
    contents = _contents("a9a", data_dir, _A9A, ("a9a", "a9a.t"))
    train = _batch(contents, "a9a", 123)
    if train is None:
        raise DatasetError("a9a: the file a9a is missing.")
    return Dataset("a9a", train, _batch(contents, "a9a.t", 123), 2, contents.files)


def ijcnn1(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """ijcnn1: 22 features; 35,000 training, 14,990 validation, 91,701 test examples.

    Args:
        data_dir: See `gradhpo.datasets.load`. `<data_dir>/ijcnn1/` holds
            `ijcnn1.tr` and `ijcnn1.val`, or `ijcnn1`, whose first 35,000 lines
            are the former; and `ijcnn1.t`. Plain or compressed, or an archive.

    Returns:
        Inputs float32 (N, 22), labels int32: 1 is the file's +1, about a tenth
        of the examples. `test` is None without `ijcnn1.t`.

    Raises:
        DatasetError: files missing or damaged. It is never downloaded, because
            no digest of the official archives could be confirmed.

    Source:
        Prokhorov (2001), IJCNN challenge, as transformed by Chang and Lin; from
        the LIBSVM data page.
    """
    names = "ijcnn1", "ijcnn1.tr", "ijcnn1.val", "ijcnn1.t"
    contents = _contents("ijcnn1", data_dir, _IJCNN1, names)
    train, validation = (_batch(contents, name, 22) for name in ("ijcnn1.tr", "ijcnn1.val"))
    if train is None or validation is None:
        both = _batch(contents, "ijcnn1", 22)
        if both is None or len(both.targets) <= _IJCNN1_TRAIN:
            raise DatasetError(
                f"ijcnn1 needs ijcnn1.tr and ijcnn1.val, or ijcnn1 with more than "
                f"{_IJCNN1_TRAIN} lines; found {[*contents.files]}."
            )
        train = DataBatch(*(part[:_IJCNN1_TRAIN] for part in both))
        validation = DataBatch(*(part[_IJCNN1_TRAIN:] for part in both))
    test = _batch(contents, "ijcnn1.t", 22)
    return Dataset("ijcnn1", train, test, 2, contents.files, validation=validation)


def parse_libsvm(data: bytes, n_features: int, name: str = "data") -> DataBatch:
    """Read LIBSVM text with labels -1 and 1.

    Returns:
        Inputs float32 (N, n_features), labels int32 in {0, 1}.

    Raises:
        DatasetError: not LIBSVM text, no lines, too many, an index outside
            `[1, n_features]`, another label, or a value that is not finite.

    >>> parse_libsvm(b"-1 1:0.5\\n1 2:2\\n", n_features=2).inputs
    array([[0.5, 0. ],
           [0. , 2. ]], dtype=float32)
    """
    try:
        inputs, labels = require("sklearn.datasets").load_svmlight_file(
            io.BytesIO(data), n_features=n_features, dtype=np.float32, zero_based=False
        )
    except (OverflowError, ValueError) as error:
        raise DatasetError(f"{name} is not LIBSVM text: {error}.") from error
    dense = 4 * labels.size * n_features
    if dense > LIMIT:  # two bytes of text are a whole row
        raise DatasetError(f"{name} would take {dense} bytes; the limit is {LIMIT}.")
    bad = np.flatnonzero(np.abs(labels) != 1)
    if bad.size or not labels.size:
        seen = f"line {bad[0] + 1} has {labels[bad[0]]:g}" if bad.size else "it has no lines"
        raise DatasetError(f"{name}: labels must be -1 or 1, but {seen}.")
    batch = DataBatch(inputs.toarray(), (labels > 0).astype(np.int32))
    try:
        check_finite(batch, name)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    return batch


def _contents(name, data_dir, remotes, names: tuple[str, ...]) -> Contents:
    return read(find(name, data_dir, remotes), lambda p: p.name in names)


def _batch(contents: Contents, name: str, n_features: int) -> DataBatch | None:
    path = by_key(contents.entries, lambda p: p.name).get(name)
    return None if path is None else parse_libsvm(contents.entries[path], n_features, name)
