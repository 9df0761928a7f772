"""Label noise, for studies of data cleaning and of sample weights."""

from typing import Any, Literal

import jax
import numpy as np

__all__ = ["corrupt_labels"]


def corrupt_labels(
    key_or_seed: Any,
    labels: np.ndarray,
    fraction: float,
    num_classes: int,
    kind: Literal["uniform", "different"] = "uniform",
) -> tuple[np.ndarray, np.ndarray]:
    """Replace the labels of a fraction of the rows.

    Exactly `round(fraction * len(labels))` rows are chosen, without
    replacement. Which rows and which labels come from independent streams: the
    rows do not depend on `kind` or `num_classes`.

    Args:
        key_or_seed: A JAX PRNG key, of either style, or an integer seed.
        labels: Integers (N,) in `[0, num_classes)`; not modified.
        fraction: Share of rows chosen, in [0, 1].
        num_classes: C.
        kind: `"uniform"`: a chosen row gets a uniformly random class, which may
            be its own, so that a share `fraction * (1 - 1 / C)` of all labels
            really changes in expectation. `"different"`: it gets one of the
            C - 1 other classes, so that exactly the chosen rows change.

    Returns:
        `(noisy, chosen)`: labels of the same dtype (N,), and a bool mask (N,)
        of the chosen rows (not of the changed ones).

    Raises:
        ValueError: an argument outside the ranges above, or fewer than two
            classes with `"different"`.

    Source:
        "uniform" is the noise of Ren et al. (2018), "Learning to Reweight
        Examples for Robust Deep Learning", and of most data-cleaning tables.

    >>> noisy, chosen = corrupt_labels(0, np.zeros(8, np.int32), 0.25, 3, kind="different")
    >>> int(chosen.sum()), bool((noisy[chosen] != 0).all())
    (2, True)
    """
    labels = np.asarray(labels)
    if kind not in ("uniform", "different"):
        raise ValueError(f"kind must be 'uniform' or 'different', got {kind!r}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}.")
    if num_classes < 1 + (kind == "different"):
        raise ValueError(f"num_classes={num_classes} leaves no class to choose for {kind!r}.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers (N,), got {labels.dtype} {labels.shape}.")
    if labels.size and not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(f"labels must lie in [0, {num_classes}), got {labels.min()}..."
                         f"{labels.max()}.")  # fmt: skip
    rows, classes = (np.random.default_rng(s) for s in _sequence(key_or_seed).spawn(2))
    count = round(fraction * len(labels))
    chosen = np.zeros(len(labels), bool)
    chosen[rows.permutation(len(labels))[:count]] = True
    noisy = labels.copy()
    if kind == "uniform":
        noisy[chosen] = classes.integers(num_classes, size=count)
    else:  # shift by 1 ... C - 1, all equally likely
        shift = classes.integers(1, num_classes, size=count)
        noisy[chosen] = (labels[chosen].astype(np.int64) + shift) % num_classes
    return noisy, chosen


def _sequence(key_or_seed: Any) -> np.random.SeedSequence:
    if isinstance(key_or_seed, jax.Array) and jax.numpy.issubdtype(
        key_or_seed.dtype, jax.dtypes.prng_key
    ):
        key_or_seed = jax.random.key_data(key_or_seed)
    return np.random.SeedSequence(np.asarray(key_or_seed).ravel().tolist())
