"""What a loader returns, and the checks made before anything is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.utils.validation import nonfinite_rows

__all__ = ["Dataset", "DatasetError", "check_finite", "check_labels", "scale_pixels"]


class DatasetError(RuntimeError):
    """A data file is missing, damaged, hostile, or not what its name says."""


@dataclass(frozen=True)
class Dataset:
    """One data set in memory, as numpy arrays.

    Attributes:
        name: The name it was loaded under.
        train: Training examples. Images are float32 in [0, 1] of shape
            `(N, height, width, channels)` (`x.reshape(len(x), -1)` flattens
            them), features float32 `(N, features)`, labels int32 `(N,)`.
            Omniglot differs: see `omniglot`.
        test: Test examples, or None where the files at hand have none.
        num_classes: Labels lie in `[0, num_classes)`.
        files: File name -> SHA-256 of each file read; empty for sets that come
            from a library or a generator.
        validation: The official validation part, where there is one.
        class_names: Name of each label, where the files give them.
    """

    name: str
    train: DataBatch
    test: DataBatch | None
    num_classes: int
    files: dict[str, str] = field(default_factory=dict)
    validation: DataBatch | None = None
    class_names: tuple[str, ...] = ()


def check_finite(batch: Sequence, split: str = "data") -> None:
    """Raise unless every floating point value of a batch is finite.

    Args:
        batch: `(inputs, targets)`, arrays with examples on the leading axis.
            Integer arrays pass.
        split: How the message calls this batch, such as `"train"`.

    Raises:
        ValueError: a value is NaN or infinite; the message has the split, the
            first index and the number of rows concerned.

    >>> import numpy as np
    >>> check_finite((np.array([[0.0], [np.nan]]), np.array([0, 1])), "validation")
    Traceback (most recent call last):
    ...
    ValueError: inputs of split 'validation' hold nan at index (1, 0); 1 of 2 rows are not finite.
    """
    for part, values in zip(("inputs", "targets"), batch, strict=True):
        values = np.asarray(values)
        if np.issubdtype(values.dtype, np.integer) or values.dtype == bool:
            continue
        if bad := nonfinite_rows(values):
            index, rows = bad
            raise ValueError(
                f"{part} of split {split!r} hold {values[index]} at index {index}; "
                f"{rows} of {len(values)} rows are not finite."
            )


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    """Return `labels` as int32 once all lie in `[0, num_classes)`.

    Raises:
        DatasetError: a label is outside; the message has its index and value.

    >>> import numpy as np
    >>> check_labels(np.array([0, 2], np.uint8), 3, "train").dtype
    dtype('int32')
    """
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise DatasetError(
            f"Labels must lie in [0, {num_classes}), but {where} has {labels[bad[0]]} at "
            f"index {bad[0]} ({bad.size} of {len(labels)} are outside). The file is damaged "
            "or belongs to another data set."
        )
    return labels.astype(np.int32)


def scale_pixels(pixels: np.ndarray) -> np.ndarray:
    """Map uint8 grey levels to float32 in [0, 1].

    >>> import numpy as np
    >>> scale_pixels(np.array([0, 255], np.uint8))
    array([0., 1.], dtype=float32)
    """
    return np.divide(pixels, np.float32(255), dtype=np.float32)
