"""Classification tasks from a labelled set: what is drawn, and how images are moved."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo.meta.augment import Move, draw_moves, move, moved
from gradhpo.meta.images import FewShot, ManyShot, quarter_turns, split_classes

# Ten classes of 10 to 19 examples, in no order.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), np.arange(10, 20)))


def _one_class_a_label(rows, labels, ways):
    """Every task label stands for one class of the set."""
    classes = {label: set(LABELS[rows[labels == label]]) for label in range(ways)}
    assert all(len(found) == 1 for found in classes.values())
    assert len(set.union(*classes.values())) == ways
    return {label: found.pop() for label, found in classes.items()}


def test_few_shot_draws_disjoint_sets_of_the_same_classes():
    sample = FewShot(LABELS, ways=4, shots=3, queries=5, steps=2)
    keys = jax.random.split(jax.random.key(0), 50)
    windows = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample))(keys))
    seen = set()
    for i in range(50):
        train, val = jax.tree.map(lambda x: x[i, 0], windows)  # noqa: B023
        support = _one_class_a_label(*train, 4)
        assert support == _one_class_a_label(*val, 4)
        assert len(set(train.rows) | set(val.rows)) == 4 * (3 + 5)
        assert np.bincount(train.beside).tolist() == [3] * 4
        seen |= set(support.items())
    assert len(seen) > 35  # of the 40 pairs of label and class
    assert all(np.array_equal(x[:, 0], x[:, 1]) for x in jax.tree.leaves(windows))


def test_tasks_are_made_of_the_given_classes():
    sample = FewShot(LABELS, ways=2, shots=1, queries=1, steps=1, classes=[3, 7])
    rows = jax.vmap(sample)(jax.random.split(jax.random.key(0), 20)).train.rows
    assert set(LABELS[np.asarray(rows).ravel()]) == {3, 7}


def test_many_shot_goes_through_its_sets_in_random_order():
    sample = ManyShot(LABELS, ways=5, shots=4, queries=6, batch_size=7, steps=6, pad=2)
    key = jax.random.key(1)
    window, sets = (jax.tree.map(np.asarray, jax.jit(f)(key)) for f in (sample, sample.sets))
    assert not set(sets.train.rows) & set(sets.val.rows)
    labels = dict(zip(sets.train.rows, sets.train.beside, strict=True))
    drawn = window.train.beside[0].ravel().tolist()
    assert drawn == [labels[row] for row in window.train.rows.flat]
    for drawn, whole in ((window.train.rows, sets.train.rows), (window.val.rows, sets.val.rows)):
        size = len(whole)
        first, second = drawn.ravel()[:size], drawn.ravel()[size : 2 * size]
        assert sorted(first) == sorted(whole)
        assert len(set(second)) == len(second)
        assert not np.array_equal(first[: len(second)], second)


def test_noise_replaces_labels_of_the_support_set_for_the_whole_task():
    clean = ManyShot(LABELS, ways=5, shots=6, queries=4, batch_size=20, steps=3)
    noisy = ManyShot(LABELS, ways=5, shots=6, queries=4, batch_size=20, steps=3, noise=0.5)
    keys = jax.random.split(jax.random.key(0), 60)
    right, given = (jax.jit(jax.vmap(sample.sets))(keys) for sample in (clean, noisy))
    assert jnp.array_equal(right.train.rows, given.train.rows)
    assert jnp.array_equal(right.val.beside, given.val.beside)
    changed = float(jnp.mean(right.train.beside != given.train.beside))
    assert changed == pytest.approx(0.5 * 4 / 5, abs=4 * np.sqrt(0.24 / 1800))
    window, support = noisy(keys[0]), noisy.sets(keys[0]).train
    labels = dict(zip(support.rows.tolist(), support.beside.tolist(), strict=True))
    drawn = window.train.beside[0].ravel().tolist()
    assert drawn == [labels[row] for row in window.train.rows.ravel().tolist()]


def test_what_cannot_be_drawn_is_refused():
    few = partial(FewShot, LABELS, steps=1)
    with pytest.raises(ValueError, match="class 0 has 10 examples, and a task takes 11"):
        few(ways=2, shots=5, queries=6)
    with pytest.raises(ValueError, match=r"ways=11 cannot be made of 10 classes"):
        few(ways=11, shots=1, queries=1)
    with pytest.raises(ValueError, match="batch_size=21 is more than the 2 x 10 examples"):
        ManyShot(LABELS, ways=2, shots=20, queries=10, batch_size=21, steps=1, classes=[8, 9])
    with pytest.raises(ValueError, match="cannot be split"):
        split_classes(LABELS, (0.99, 0.01))


def test_classes_are_split_into_disjoint_groups():
    groups = split_classes(LABELS, (0.5, 0.2, 0.3), seed=1)
    assert [len(group) for group in groups] == [5, 2, 3]
    assert sorted(np.concatenate(groups)) == list(range(10))
    assert not np.array_equal(groups[0], split_classes(LABELS, (0.5, 0.2, 0.3), seed=2)[0])


def test_quarter_turns_are_classes_of_their_own():
    image = np.arange(4).reshape(1, 2, 2, 1)
    images, labels = quarter_turns(image, np.array([0]))
    assert images[..., 0].tolist() == [
        [[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]
    ]  # fmt: skip
    assert labels.tolist() == [0, 1, 2, 3]


def test_images_are_shifted_and_mirrored_one_by_one():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    moves = draw_moves(jax.random.key(0), (6,), 2)
    got = jax.jit(move, static_argnums=2)(images, moves, 2)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for i in range(6):
        down, right = int(moves.down[i]), int(moves.right[i])
        want = padded[i, down : down + 5, right : right + 4]
        want = want[:, ::-1] if moves.mirror[i] else want
        np.testing.assert_array_equal(got[i], want)
    assert len(set(zip(*np.asarray(moves), strict=True))) > 3


def test_a_loss_sees_the_moved_images():
    seen = moved(lambda params, lam, batch: batch, 1)
    images, labels = jnp.arange(8.0).reshape(2, 2, 2, 1), jnp.array([0, 1])
    still = Move(*jnp.array([[1, 1], [1, 1]]), jnp.array([False, True]))
    got, kept = seen((), (), (images, (labels, still)))
    np.testing.assert_array_equal(got[0], images[0])
    np.testing.assert_array_equal(got[1], images[1][:, ::-1])
    assert kept is labels
    assert moved(lambda params, lam, batch: batch, 0)((), (), (images, (labels, ())))[0] is images
