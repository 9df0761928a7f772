"""Splits are disjoint; batches are seeded, of one shape, and never quietly empty."""

import numpy as np
import pytest

from gradhpo.core.types import DataBatch
from gradhpo.datasets import batches, check_finite, epoch_indices, sample_indices, split

DATA = DataBatch(np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10, dtype=np.int32))


def test_split_is_disjoint_and_keeps_pairs():
    parts = split(DATA, (5, 3, 1), seed=0)
    assert [len(p.targets) for p in parts] == [5, 3, 1]
    rows = np.concatenate([p.targets for p in parts])
    assert len(set(rows)) == 9
    for part in parts:
        np.testing.assert_array_equal(part.inputs, DATA.inputs[part.targets])
    again, other = split(DATA, (5, 3, 1), seed=0), split(DATA, (5, 3, 1), seed=1)
    np.testing.assert_array_equal(parts[0].targets, again[0].targets)
    assert (parts[0].targets != other[0].targets).any()


def test_split_warns_of_identical_rows():
    inputs = DATA.inputs.copy()
    inputs[7] = inputs[2]
    warned = 0
    for seed in range(20):
        rows = np.random.default_rng(seed).permutation(10)
        apart = (list(rows).index(7) < 5) != (list(rows).index(2) < 5)
        if apart:
            with pytest.warns(UserWarning, match="1 rows of part 1 have inputs identical"):
                split((inputs, DATA.targets), (5, 5), seed)
            warned += 1
        else:
            split((inputs, DATA.targets), (5, 5), seed)  # warnings are errors here
    assert 0 < warned < 20


@pytest.mark.parametrize("sizes", [(), (0, 5), (-1, 5), (6, 5), (11,)])
def test_split_sizes_must_fit(sizes):
    with pytest.raises(ValueError, match="add up to at most 10"):
        split(DATA, sizes, seed=0)


def test_epoch_indices():
    first, second = (epoch_indices(0, 10, 3, epoch) for epoch in (0, 1))
    for indices in (first, second):
        assert indices.shape == (3, 3) and indices.dtype == np.int32
        assert len(set(indices.ravel())) == 9
    assert (first != second).any()
    assert sorted(epoch_indices(4, 10, 5).ravel()) == list(range(10))


def test_sample_indices_without_replacement_are_epochs():
    indices = sample_indices(0, 10, 4, steps=5)
    expected = np.concatenate([epoch_indices(0, 10, 4, epoch) for epoch in range(3)])[:5]
    np.testing.assert_array_equal(indices, expected)
    assert indices.shape == (5, 4) and indices.dtype == np.int32


def test_sample_indices_with_replacement():
    indices = sample_indices(0, 5, 100, steps=200, replace=True)
    assert indices.shape == (200, 100) and indices.dtype == np.int32
    counts = np.bincount(indices.ravel())
    np.testing.assert_allclose(counts, 4000, atol=5 * np.sqrt(3200))


def test_batches_follow_sample_indices_and_can_go_on():
    next_batch = batches(DATA, 4, seed=3)
    rows = sample_indices(3, 10, 4, steps=7)
    seen = [next_batch() for _ in range(7)]
    for batch, row in zip(seen, rows, strict=True):
        assert isinstance(batch, DataBatch) and batch.inputs.shape == (4, 2)
        np.testing.assert_array_equal(batch.targets, row)
        np.testing.assert_array_equal(batch.inputs, DATA.inputs[row])
    for start in range(6):
        np.testing.assert_array_equal(batches(DATA, 4, 3, start)().targets, rows[start])


def test_batches_never_change_shape():
    """A batch of another shape would compile the training step again."""
    next_batch = batches((np.zeros((7, 2)), np.zeros(7)), 3, seed=0)
    assert {next_batch().inputs.shape for _ in range(12)} == {(3, 2)}


@pytest.mark.parametrize(
    "data, size",
    [
        ((np.zeros((0, 2)), np.zeros(0)), 1),
        ((np.zeros((3, 2)), np.zeros(2)), 1),
        ((np.zeros(()), np.zeros(())), 1),
        (DATA, 11),
        (DATA, 0),
        (DATA, -1),
    ],
)
def test_batches_fail_at_once(data, size):
    with pytest.raises(ValueError, match="examples"):
        batches(data, size, seed=0)


@pytest.mark.parametrize(
    "arguments", [(0, 0, 1, 1), (0, 5, 6, 1), (0, 5, 0, 1), (0, 5, 1, 0), (0, 5, 1, -1)]
)
def test_indices_fail_at_once(arguments):
    with pytest.raises(ValueError):
        sample_indices(*arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    inputs = DATA.inputs.copy()
    inputs[6, 1] = inputs[8, 0] = value
    message = rf"inputs of split 'validation' hold {value} at index \(6, 1\); 2 of 10 rows"
    with pytest.raises(ValueError, match=message):
        check_finite(DataBatch(inputs, DATA.targets), "validation")
    with pytest.raises(ValueError, match="not finite"):
        batches((inputs, DATA.targets), 2, seed=0)
    with pytest.raises(ValueError, match="targets of split"):
        check_finite((DATA.targets, inputs))
