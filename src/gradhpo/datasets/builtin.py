"""Data sets that need no files: scikit-learn's digits, and Gaussian clusters."""

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.dataset import Dataset
from gradhpo.datasets.download import require

__all__ = ["digits", "gaussian_clusters"]


def digits() -> Dataset:
    """Digits: 1,797 handwritten digits of shape (8, 8, 1), from scikit-learn.

    Returns:
        All examples as `train`, grey levels 0-16 scaled to [0, 1]; there is no
        test part. `gradhpo.datasets.split` makes one.

    Raises:
        ImportError: scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI.

    >>> digits().train.inputs.shape
    (1797, 8, 8, 1)
    """
    bunch = require("sklearn.datasets").load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    return Dataset("digits", DataBatch(images, bunch.target.astype(np.int32)), None, 10)


def gaussian_clusters(
    num_train: int = 512,
    num_test: int = 256,
    num_features: int = 8,
    num_classes: int = 4,
    separation: float = 2.0,
    seed: int = 0,
) -> Dataset:
    """Gaussian clusters: one isotropic unit-variance Gaussian per class.

    Args:
        num_train: Number of training examples; classes are drawn uniformly.
        num_test: Number of test examples, from a stream of their own, so that
            changing `num_train` leaves them alone.
        num_features: Length of an example.
        num_classes: Number of classes.
        separation: Centres are drawn from a normal distribution with this
            standard deviation per feature.
        seed: The same seed gives the same arrays.

    Returns:
        Inputs float32 (N, num_features), labels int32 (N,).

    Raises:
        ValueError: a size is not positive.

    >>> gaussian_clusters(num_train=3, num_features=2).train.inputs.shape
    (3, 2)
    """
    sizes = (num_train, num_test, num_features, num_classes)
    if min(sizes) < 1:
        raise ValueError(f"Sizes must be positive, got {sizes}.")
    rng, *streams = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    centres = separation * rng.standard_normal((num_classes, num_features))

    def draw(rng: np.random.Generator, count: int) -> DataBatch:
        labels = rng.integers(num_classes, size=count)
        inputs = centres[labels] + rng.standard_normal((count, num_features))
        return DataBatch(inputs.astype(np.float32), labels.astype(np.int32))

    train, test = (draw(r, n) for r, n in zip(streams, (num_train, num_test), strict=True))
    return Dataset("gaussian_clusters", train, test, num_classes)
