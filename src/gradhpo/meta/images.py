"""Classification tasks from a labelled set of images: few-shot and many-shot.

A task is `ways` classes of the set, named 0 to ways - 1 anew in random order, and for each of them
examples to train on (the support set) and others that validate (the query set). What is sampled
are rows of the set, not images: with `Task(train=Pool(images), val=Pool(images))` the loss gets
`(images[rows], labels)`, and nothing but row numbers is ever stored per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradhpo.core.problem import Window
from gradhpo.core.source import Picked
from gradhpo.meta.augment import draw_moves
from gradhpo.utils.settings import check_count, check_fraction

__all__ = ["FewShot", "ManyShot", "quarter_turns", "shuffled", "split_classes"]


@dataclass(frozen=True, eq=False)
class FewShot:
    """N-way K-shot: `sample(key) -> Window` of rows; every step sees the whole support set.

    The batches are `Picked(rows, labels)`, sorted by label: (steps, ways * shots) in `train` and
    (steps, ways * queries) in `val`. All steps of a task have the same.

    Args:
        labels: Of the whole set, integers (n,).
        ways: Classes of a task.
        shots, queries: Examples of each class to train on, and others to validate on.
        steps: T, training steps of a task.
        classes: Labels of the classes that tasks are made of; None: all.

    Raises:
        ValueError: fewer classes than `ways`, or a class with too few examples.

    >>> sample = FewShot(np.repeat(np.arange(6), 4), ways=3, shots=1, queries=2, steps=5)
    >>> window = sample(jax.random.key(0))
    >>> window.train.rows.shape, window.val.rows.shape, window.val.beside[0].tolist()
    ((5, 3), (5, 6), [0, 0, 1, 1, 2, 2])
    """

    labels: np.ndarray
    ways: int
    shots: int
    queries: int
    steps: int
    classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries", "steps"):
            check_count(name, getattr(self, name))
        assert len(self._table)  # made, and so checked, now

    @cached_property
    def _table(self) -> np.ndarray:
        return _rows_by_class(self.labels, self.classes, self.ways, self.shots + self.queries)

    def __call__(self, key: jax.Array) -> Window:
        drawn = _draw(key, self._table, self.ways, self.shots, self.queries)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.steps, *x.shape)), drawn)


@dataclass(frozen=True, eq=False)
class ManyShot:
    """N-way many-shot: `sample(key) -> Window` of mini-batches from hundreds of examples a class.

    The batches of `train` are `Picked(rows, (labels, moves))` of the support set, those of `val`
    `Picked(rows, labels)` of the query set, (steps, batch_size) each. They go through their set in
    one random order after another. `moves` say how `gradhpo.meta.augment.move` shifts and mirrors
    every image; they are drawn with the batch, so whoever evaluates it again sees the same images.

    Args:
        labels: Of the whole set, integers (n,).
        ways: Classes of a task.
        shots, queries: Examples of each class in the support set and in the query set.
        batch_size: Examples of a step.
        steps: T, training steps of a task.
        pad: Pixels by which training images are shifted at most, and mirrored half of the time; 0:
            neither, and `moves` is `()`.
        noise: Probability with which a label of the support set is replaced by a random one, which
            may be the right one, for the whole task.
        classes: Labels of the classes that tasks are made of; None: all.

    Raises:
        ValueError: as `FewShot`, or a batch larger than one of the two sets.

    Source:
        Lee et al. (2022), section 5: 10 ways, 250 + 250 examples a class, batches of 100, T = 100,
        noise 0.4 for MetaWeightNet.

    >>> labels = np.repeat(np.arange(6), 40)
    >>> sample = ManyShot(labels, ways=3, shots=20, queries=20, batch_size=8, steps=5, pad=2)
    >>> window = sample(jax.random.key(0))
    >>> window.train.rows.shape, window.train.beside[1].down.shape, window.val.beside.shape
    ((5, 8), (5, 8), (5, 8))
    """

    labels: np.ndarray
    ways: int
    shots: int
    queries: int
    batch_size: int
    steps: int
    pad: int = 0
    noise: float = 0.0
    classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries", "batch_size", "steps"):
            check_count(name, getattr(self, name))
        check_count("pad", self.pad, minimum=0)
        check_fraction("noise", self.noise)
        for name in ("shots", "queries"):
            if self.batch_size > self.ways * getattr(self, name):
                raise ValueError(
                    f"batch_size={self.batch_size} is more than the {self.ways} x "
                    f"{getattr(self, name)} examples of ways and {name}."
                )
        assert len(self._table)  # made, and so checked, now

    @cached_property
    def _table(self) -> np.ndarray:
        return _rows_by_class(self.labels, self.classes, self.ways, self.shots + self.queries)

    def sets(self, key: jax.Array) -> Window:
        """The support set and the query set of the task that this key draws, without a step axis:
        `Picked(rows, labels)` each, the labels of the support set with their noise."""
        for_task, for_noise, _ = jax.random.split(key, 3)
        drawn = _draw(for_task, self._table, self.ways, self.shots, self.queries)
        if not self.noise:
            return drawn
        where, what = jax.random.split(for_noise)
        rows, labels = drawn.train
        wrong = jax.random.randint(what, labels.shape, 0, self.ways)
        noisy = jnp.where(jax.random.bernoulli(where, self.noise, labels.shape), wrong, labels)
        return drawn._replace(train=Picked(rows, noisy))

    def __call__(self, key: jax.Array) -> Window:
        support, query = self.sets(key)
        for_train, for_val, for_moves = jax.random.split(jax.random.split(key, 3)[2], 3)
        shape = self.steps, self.batch_size
        rows, labels = shuffled(for_train, support, *shape)
        moves = draw_moves(for_moves, shape, self.pad) if self.pad else ()
        return Window(Picked(rows, (labels, moves)), shuffled(for_val, query, *shape))


def shuffled(key: jax.Array, examples: Picked, steps: int, batch_size: int) -> Picked:
    """(steps, batch_size) of the examples: in random order, in another one when all were seen.

    >>> batches = shuffled(jax.random.key(0), Picked(jnp.arange(4), jnp.ones(4)), 3, 2)
    >>> sorted(batches.rows[:2].ravel().tolist()), batches.beside.shape
    ([0, 1, 2, 3], (3, 2))
    """
    size, wanted = len(examples.rows), steps * batch_size
    keys = jax.random.split(key, -(-wanted // size))
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys).reshape(-1)[:wanted]
    return jax.tree.map(lambda x: x[order].reshape(steps, batch_size), examples)


def split_classes(
    labels: np.ndarray, parts: Sequence[float], seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Disjoint groups of the classes, for meta-training, meta-validation and meta-testing.

    Args:
        labels: Of the whole set, integers.
        parts: Their shares, such as (0.5, 0.2, 0.3); the last group takes what rounding leaves.

    Returns:
        For each part its labels, sorted.

    Raises:
        ValueError: a share that is not positive, or that gets no class.

    >>> [len(part) for part in split_classes(np.arange(100), (0.5, 0.2, 0.3))]
    [50, 20, 30]
    """
    classes = np.random.default_rng(seed).permutation(np.unique(labels))
    shares = np.asarray(parts, float)
    cuts = np.round(np.cumsum(shares)[:-1] / shares.sum() * len(classes)).astype(int)
    groups = tuple(np.sort(group) for group in np.split(classes, cuts))
    if (shares <= 0).any() or min(map(len, groups)) == 0:
        raise ValueError(f"{len(classes)} classes cannot be split in shares {tuple(parts)}.")
    return groups


def quarter_turns(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four times the set, turned by 0, 90, 180 and 270 degrees, with classes of their own.

    Args:
        images: (n, side, side, channels).
        labels: (n,); label c becomes c, c + C, c + 2 C and c + 3 C, C their greatest plus one.

    Source:
        Santoro et al. (2016), who made few classes of Omniglot many.

    >>> images, labels = quarter_turns(np.zeros((2, 4, 4, 1)), np.array([0, 1]))
    >>> images.shape, labels.tolist()
    ((8, 4, 4, 1), [0, 1, 2, 3, 4, 5, 6, 7])
    """
    count = int(labels.max()) + 1
    turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return np.concatenate(turned), np.concatenate([labels + turns * count for turns in range(4)])


def _rows_by_class(labels: Any, classes: Any, ways: int, wanted: int) -> np.ndarray:
    """(classes, most examples of a class) rows, -1 where there are no more."""
    labels = np.asarray(labels)
    classes = np.unique(labels) if classes is None else np.asarray(classes)
    if len(classes) < ways:
        raise ValueError(f"a task of ways={ways} cannot be made of {len(classes)} classes.")
    found = [np.flatnonzero(labels == label) for label in classes]
    for label, rows in zip(classes, found, strict=True):
        if len(rows) < wanted:
            raise ValueError(
                f"class {label} has {len(rows)} examples, and a task takes {wanted} of each: shots "
                "and queries together."
            )
    table = np.full((len(found), max(map(len, found))), -1, np.int32)
    for at, rows in zip(table, found, strict=True):
        at[: len(rows)] = rows
    return table


def _draw(key: jax.Array, table: np.ndarray, ways: int, shots: int, queries: int) -> Window:
    """Rows and labels of a task, `Picked` each, sorted by label."""
    for_classes, for_rows = jax.random.split(key)
    chosen = jax.random.permutation(for_classes, len(table))[:ways]
    rows = jnp.asarray(table)[chosen]
    order = jnp.where(rows >= 0, jax.random.uniform(for_rows, rows.shape), -1.0)  # -1: none there
    best = lax.top_k(order, shots + queries)[1]
    rows = jnp.take_along_axis(rows, best, axis=1)

    def picked(rows: jax.Array) -> Picked:
        labels = jnp.repeat(jnp.arange(ways), rows.shape[1])
        return Picked(rows.reshape(-1), labels)

    return Window(picked(rows[:, :shots]), picked(rows[:, shots:]))
