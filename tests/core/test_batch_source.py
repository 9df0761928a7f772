"""Where batches come from: resident arrays, callables, stacking."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import DataBatch, Resident
from gradhpo.core.problem import Window
from gradhpo.core.source import draw, fetch, gather, stack
from gradhpo.utils.arrays import as_arrays, owned


def test_resident_draws_the_same_again_and_others_elsewhere():
    source = Resident((np.arange(50.0), np.arange(50)), batch_size=8, seed=3)
    a, b = source.indices(20, 4), source.indices(20, 4)
    assert a.shape == (4, 8) and a.dtype == np.int32
    np.testing.assert_array_equal(a, b)
    assert a.min() >= 0 and a.max() < 50
    assert not np.array_equal(a, source.indices(24, 4))
    other = Resident(source.data, batch_size=8, seed=4)
    assert not np.array_equal(a, other.indices(20, 4))


@pytest.mark.parametrize(
    "data, size, error, message",
    [
        ((np.zeros(3), np.zeros(4)), 2, ValueError, r"share a leading axis.*\[3, 4\]"),
        ((np.zeros((0, 2)),), 2, ValueError, "at least one example"),
        (np.array(1.0), 2, ValueError, "at least one example"),
        (np.zeros(3), 0, ValueError, "batch_size must be at least 1, got 0"),
        (np.zeros(3), 2.0, TypeError, "batch_size must be a whole number, got 2.0"),
        (np.zeros(3), 4, ValueError, "batch_size=4 is more than the 3 examples"),
        (
            {"x": np.array([[0.0, 1.0], [np.inf, np.nan], [0.0, np.nan]])},
            2,
            ValueError,
            r"leaf \['x'\].*holds inf at index \(1, 0\); 2 of 3 rows are not finite",
        ),
        (jnp.array([0.0, jnp.nan]), 1, ValueError, r"holds nan at index \(1,\); 1 of 2 rows"),
        (np.array([1, "a"], object), 1, TypeError, "resident data set has dtype object"),
    ],
)
def test_resident_refuses(data, size, error, message):
    with pytest.raises(error, match=message):
        Resident(data, batch_size=size)


def test_resident_keeps_a_copy_of_its_own():
    data = {"x": np.ones((4, 2), np.float32), "y": [1, 2, 3, 4], "z": jnp.ones(4)}
    source = Resident(data, batch_size=2)
    data["x"][:] = 7
    np.testing.assert_array_equal(source.data["x"], np.ones((4, 2)))
    np.testing.assert_array_equal(source.data["y"], [1, 2, 3, 4])
    assert source.data["z"] is data["z"]  # what cannot change needs no copy


class Foreign:
    """An array of another library: all it has in common with ours is `__array__`."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


REFILLED = {
    "whole": lambda buffer: buffer,
    "view": lambda buffer: (buffer[1:3], buffer[0]),
    "foreign": lambda buffer: {"x": Foreign(buffer)},
    "beside a key": lambda buffer: (jax.random.key(0), buffer),
    "read-only": lambda buffer: np.broadcast_to(buffer, (2, 4)),
}


@pytest.mark.parametrize("kind", REFILLED)
def test_a_source_may_refill_its_buffer(kind):
    """What is handed over is copied when it comes, not when the episode is complete."""
    buffer, calls = np.zeros(4, np.float32), itertools.count(1)

    def source():
        buffer[:] = next(calls)
        return REFILLED[kind](buffer)

    window = draw(source, lambda: np.ones(2), 0, 3)
    for leaf in jax.tree.leaves(window.train):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(leaf.reshape(3, -1)[:, 0], [1, 2, 3])


def test_a_memory_map_may_be_written_to(tmp_path):
    mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=(3,))

    def source():
        mapped[:] += 1
        return mapped

    window = draw(source, source, 0, 2)
    np.testing.assert_array_equal(window.train[:, 0], [1, 3])
    np.testing.assert_array_equal(window.val[:, 0], [2, 4])


def test_what_step_is_given_is_copied():
    """The program may run on when the call is over: it must not read the caller's memory."""
    buffer = np.ones(4, np.float32)
    batch = owned({"x": buffer[1:], "n": 3, "key": jax.random.key(0), "y": [1.0]})
    assert not np.shares_memory(batch["x"], buffer)
    assert batch["n"] == 3 and isinstance(batch["y"], np.ndarray)


def test_draw_calls_alternately_and_in_order():
    calls = []

    def source(name):
        numbers = itertools.count()

        def get():
            calls.append(name)
            return np.full(2, next(numbers), np.float32)

        return get

    window = draw(source("train"), source("val"), 0, 3)
    assert calls == ["train", "val"] * 3
    np.testing.assert_array_equal(window.train[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(window.val[:, 0], [0, 1, 2])


def test_draw_mixes_resident_and_called_sides():
    resident = Resident(np.arange(10.0), batch_size=4, seed=0)
    window = draw(resident, lambda: np.ones(3), 40, 5)
    np.testing.assert_array_equal(window.train, resident.indices(40, 5))
    assert window.val.shape == (5, 3)
    batches = fetch(Window(resident.data, None), window)
    np.testing.assert_array_equal(batches.train, np.asarray(window.train, np.float64))
    np.testing.assert_array_equal(gather(resident.data, jnp.array([[2, 0]])), [[2, 0]])


def test_an_exhausted_iterator_is_explained():
    batches = iter([np.ones(2), np.ones(2)])
    with pytest.raises(ValueError, match="get_train_batch ran out of data at batch 3 of 4"):
        draw(lambda: next(batches), lambda: np.ones(2), 0, 4)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([np.ones(3), np.ones(2)], r"one shape.*\(3,\) in batch 1 and \(2,\) in batch 2"),
        ([(np.ones(3), np.ones(3)), (np.ones(3),)], r"batch 2 of the episode.*keep its structure"),
        ([np.ones((0, 3)), np.ones((0, 3))], "empty batch"),
        (
            [np.ones(3, np.float32), np.ones(3, np.int32)],
            r"one dtype.*float32.*int32 in batch 2",
        ),
        ([(), ()], "batch without arrays; give a dummy"),
    ],
    ids=["ragged", "structure", "empty", "dtype", "nothing"],
)
def test_batches_that_cannot_be_stacked_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        stack("get_train_batch", batches)


def test_stack_keeps_containers_dtypes_and_keys():
    batches = [DataBatch(np.full(2, i, np.float32), np.full(2, i, np.int32)) for i in range(3)]
    stacked = stack("get_train_batch", batches)
    assert isinstance(stacked, DataBatch)
    assert stacked.inputs.dtype == np.float32 and stacked.targets.dtype == np.int32
    np.testing.assert_array_equal(stacked.targets[:, 0], [0, 1, 2])
    keys = [jax.random.key(i) for i in range(3)]
    stacked = stack("get_train_batch", [(jnp.ones(2), k) for k in keys])
    np.testing.assert_array_equal(
        jax.random.key_data(stacked[1]), np.stack([jax.random.key_data(k) for k in keys])
    )


def test_lists_of_numbers_become_arrays_and_containers_stay():
    got = as_arrays(([1.0, 2.0], [jnp.ones(2), 3]))
    assert isinstance(got[0], np.ndarray) and isinstance(got[1], list)
    np.testing.assert_array_equal(got[0], [1.0, 2.0])
