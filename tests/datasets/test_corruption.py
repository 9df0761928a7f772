"""Label noise does what its docstring says, to the row."""

import jax
import numpy as np
import pytest

from gradhpo.datasets import corrupt_labels

LABELS = np.random.default_rng(0).integers(10, size=20_000).astype(np.int32)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 1.0])
def test_fraction_is_exact(fraction):
    for kind in ("uniform", "different"):
        noisy, chosen = corrupt_labels(1, LABELS, fraction, 10, kind)
        assert chosen.sum() == round(fraction * len(LABELS)) and chosen.dtype == bool
        assert noisy.dtype == LABELS.dtype and noisy.shape == LABELS.shape
        np.testing.assert_array_equal(noisy[~chosen], LABELS[~chosen])
        changed = (noisy != LABELS).mean()
        if kind == "different":
            np.testing.assert_array_equal(noisy != LABELS, chosen)
        else:  # binomial: 5 standard deviations
            expected = fraction * 0.9
            deviation = 5 * np.sqrt(fraction * 0.9 * 0.1 / len(LABELS))
            assert abs(changed - expected) <= deviation


def test_classes_are_uniform():
    zeros = np.zeros(50_000, np.int32)
    uniform = np.bincount(corrupt_labels(0, zeros, 1.0, 5)[0], minlength=5)
    np.testing.assert_allclose(uniform, 10_000, atol=5 * np.sqrt(8_000))
    different = np.bincount(corrupt_labels(0, zeros, 1.0, 5, "different")[0], minlength=5)
    assert different[0] == 0
    np.testing.assert_allclose(different[1:], 12_500, atol=5 * np.sqrt(9_375))


def test_rows_and_classes_have_independent_streams():
    _, chosen = corrupt_labels(3, LABELS, 0.3, 10)
    for num_classes, kind in ((10, "different"), (17, "uniform")):
        np.testing.assert_array_equal(corrupt_labels(3, LABELS, 0.3, num_classes, kind)[1], chosen)
    noisy, _ = corrupt_labels(3, np.zeros_like(LABELS), 1.0, 10)
    table = np.stack([np.bincount(noisy[chosen], minlength=10) / chosen.sum(),
                      np.bincount(noisy[~chosen], minlength=10) / (~chosen).sum()])  # fmt: skip
    np.testing.assert_allclose(table[0], table[1], atol=0.03)


def test_seeds_and_keys():
    same = [corrupt_labels(seed, LABELS, 0.2, 10)[0] for seed in (5, 5, 6)]
    assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    old, new, other = (
        corrupt_labels(k, LABELS, 0.2, 10)[0] for k in (old, new, jax.random.split(new)[0])
    )
    assert (old == new).all() and (old != other).any()


def test_input_is_left_alone():
    before = LABELS.copy()
    corrupt_labels(0, LABELS, 1.0, 10)
    np.testing.assert_array_equal(LABELS, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_narrow_types_do_not_overflow(dtype):
    noisy, _ = corrupt_labels(0, np.full(500, 99, dtype), 1.0, 100, "different")
    assert noisy.dtype == dtype and noisy.max() <= 98 and noisy.min() >= 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fraction": 1.1}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"num_classes": 9}, "lie in"),
        ({"labels": -LABELS}, "lie in"),
        ({"labels": LABELS.astype(float)}, "integers"),
        ({"labels": LABELS[None]}, "integers"),
        ({"num_classes": 1, "kind": "different"}, "no class"),
        ({"kind": "flip"}, "kind"),
    ],
)
def test_bad_arguments(change, message):
    good = {"key_or_seed": 0, "labels": LABELS, "fraction": 0.5, "num_classes": 10}
    with pytest.raises(ValueError, match=message):
        corrupt_labels(**(good | change))
