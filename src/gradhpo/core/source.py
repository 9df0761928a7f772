"""Where batches come from: host callables stacked per episode, resident arrays, batches in order.

A callable returns one batch per call. A `Resident` keeps the whole data set on the
device, and only indices are drawn on the host; the batch is gathered inside the
compiled step. `InOrder` has the batches of all steps stacked already. Either way a run never
holds memory that somebody else may write to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradhpo.core.problem import Window
from gradhpo.core.types import Batch, PyTree
from gradhpo.utils.arrays import as_arrays, owned
from gradhpo.utils.settings import check_callable, check_count
from gradhpo.utils.validation import check_alike, check_batch, leaves_with_names, nonfinite_rows

__all__ = [
    "BatchSource",
    "InOrder",
    "Picked",
    "Pool",
    "Resident",
    "Whole",
    "check_pools",
    "check_source",
    "draw",
    "fetch",
    "gather",
    "on_host",
    "resident",
    "stack",
]


class Picked(NamedTuple):
    """Rows of a data set that stays on the device, in the place of a batch.

    The losses get `(data[rows], beside)`.
    """

    rows: Any  # an integer array of any shape
    beside: PyTree = ()  # what else belongs to the batch: labels of the task, PRNG keys


class Whole(NamedTuple):
    """All of a data set that stays on the device, in order, in the place of a batch."""

    of: Any  # an array with an entry for every batch; what it holds is not looked at


class Pool:
    """Data that stay on the device, from which `begin` picks the batches of a task.

    Given as `train=` or `val=` of a task or run, it draws nothing by itself: the windows of
    `Start(params, window)` hold row numbers in place of the examples, as an array or as `Picked`,
    and a batch is gathered when its step comes.

    Args:
        data: Arrays that share their leading axis; finite. NumPy arrays are copied.

    >>> pool = Pool(np.zeros((100, 28, 28), np.uint8))
    >>> gather(pool.data, Picked(np.array([3, 5]), np.array([0, 1])))[0].shape
    (2, 28, 28)
    """

    def __init__(self, data: Batch):
        self.data, self.length = _on_device(data)


class Resident:
    """Batches of arrays that stay on the device: drawn with replacement, or all of them each time.

    Pass one in place of `get_train_batch` or `get_val_batch`: nothing but T x batch_size
    indices crosses from the host per episode, and without a batch size T bytes.

    Args:
        data: Arrays that share their leading axis, for example `(inputs, targets)`; finite.
            NumPy arrays are copied, so that later changes in place change nothing here.
        batch_size: Examples per batch, at most as many as there are. None: every batch is the
            whole set, in order, and nothing is gathered.
        seed: Of the draws. The same seed draws the same batches for every method.

    >>> source = Resident((np.zeros((100, 8)), np.zeros(100)), batch_size=32)
    >>> source.indices(first=0, steps=20).shape
    (20, 32)
    """

    def __init__(self, data: Batch, batch_size: int | None = None, seed: int = 0):
        self.data, self.length = _on_device(data)
        self.whole = batch_size is None
        self.batch_size = self.length if self.whole else check_count("batch_size", batch_size)
        if self.batch_size > self.length:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {self.length} examples of the data "
                "set; drawn with replacement, a batch would repeat some for certain. Take at most "
                f"{self.length}; for all of them at every step, leave batch_size out."
            )
        self.seed = check_count("seed", seed, minimum=0)

    def indices(self, first: int, steps: int) -> np.ndarray:
        """int32 indices (steps, batch_size) of the episode that begins with step `first`.

        The same at every call, so every method sees the same batches and a run can go on.
        """
        if self.whole:
            return np.broadcast_to(np.arange(self.length, dtype=np.int32), (steps, self.length))
        generator = np.random.default_rng((self.seed, first))
        return generator.integers(0, self.length, (steps, self.batch_size), dtype=np.int32)

    @property
    def bytes_per_step(self) -> int:
        """What crosses from the host for a batch."""
        return 1 if self.whole else 4 * self.batch_size

    def steps(self, first: int, count: int) -> np.ndarray | Whole:
        """What stands for the batches of these steps in a window, until `fetch`."""
        return Whole(np.zeros(count, np.int8)) if self.whole else self.indices(first, count)


def _on_device(data: Batch) -> tuple[Batch, int]:
    """Copies of a data set's arrays, and how many examples there are."""
    data = as_arrays(data)
    lengths = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "the arrays of a resident data set must share a leading axis of at least one "
            f"example, but their lengths are {sorted(lengths)}."
        )
    check_batch("a resident data set", data)
    for name, x in leaves_with_names(data):
        _check_finite(name, x)
    data = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.array(x), data)
    return data, lengths.pop()


def _check_finite(name: str, values: Any) -> None:
    if isinstance(values, Tracer) or not jnp.issubdtype(jnp.result_type(values), jnp.inexact):
        return
    if bad := nonfinite_rows(values):
        index, rows = bad
        raise ValueError(
            f"leaf {name} of a resident data set holds {values[index]} at index {index}; {rows} of "
            f"{len(values)} rows are not finite, and every batch with one of them would be "
            "rejected. Drop or fill these rows; mark missing values by a mask beside them."
        )


class InOrder:
    """Batches that are there already, stacked along a leading axis: one a step, from the first on.

    Args:
        batches: Arrays that share their leading axis, the step.

    Raises:
        ValueError: there is no array, not all share their leading axis, or batches are empty; the
            message names one.

    >>> InOrder(np.arange(6).reshape(3, 2)).steps(first=1, count=2)
    array([[2, 3],
           [4, 5]])
    """

    def __init__(self, batches: Batch):
        self.batches = owned(batches)
        leaves = leaves_with_names(self.batches)
        if not leaves:
            raise ValueError(
                "a source InOrder has no arrays; give a dummy, such as np.zeros(steps)."
            )
        name, first = leaves[0]
        wanted = np.shape(first)[:1]
        for other, leaf in leaves:
            if not wanted or np.shape(leaf)[:1] != wanted:
                raise ValueError(
                    "the batches of a source InOrder are stacked along a leading axis, the step, "
                    f"which all leaves share; but leaf {name} has the shape {np.shape(first)} and "
                    f"leaf {other} the shape {np.shape(leaf)}."
                )
        check_batch("a source InOrder", self.batches)
        # Rows of no width are a dummy where there are no data; batches without examples are none.
        check_batch("a source InOrder", [x[0] for _, x in leaves if np.ndim(x) > 2])
        self.length = wanted[0]

    def steps(self, first: int, count: int) -> Batch:
        """The batches of steps `first` to `first + count - 1`, stacked.

        Raises:
            ValueError: there are not so many.
        """
        if first + count > self.length:
            raise ValueError(
                f"a source InOrder holds the batches of {self.length} steps, and step "
                f"{first + count} is asked for: stack more of them, or take a source that draws, "
                "gradhpo.Resident or a function."
            )
        return jax.tree.map(lambda x: x[first : first + count], self.batches)


BatchSource = Callable[[], Batch] | Resident | InOrder | Pool


def check_source(name: str, source: Any) -> None:
    """A source of batches.

    Raises:
        TypeError: something else.
    """
    if not isinstance(source, Resident | InOrder | Pool):
        check_callable(name, source, "() -> batch, a gradhpo.Resident or a gradhpo.InOrder")


def check_pools(train: Any, val: Any, begin: Any) -> None:
    """Two of them or none, and a start that picks.

    Raises:
        ValueError: something is missing.
    """
    pools = [isinstance(source, Pool) for source in (train, val)]
    if any(pools) and not (all(pools) and begin is not None):
        raise ValueError(
            "a gradhpo.Pool waits for the rows that begin picks: give one as train= and as val= "
            "(the same, if both take from it), and begin=, a function (params, hyperparams, draw) "
            "-> gradhpo.Start(params, Window(rows, rows))."
        )


def resident(train: BatchSource | None, val: BatchSource | None) -> Window:
    """The data sets of these sources that stay on the device; None for the others."""
    return Window(*(s.data if isinstance(s, Resident | Pool) else None for s in (train, val)))


def draw(train: BatchSource, val: BatchSource, first: int, steps: int) -> Window:
    """The stacked batches (or index rows) of one episode, drawn alternately and in order."""
    sources: dict[str, Any] = {"get_train_batch": train, "get_val_batch": val}
    drawn = {
        name: _Stack(name, steps)
        for name, source in sources.items()
        if not isinstance(source, Resident | InOrder)
    }
    for t in range(steps if drawn else 0):  # T may be anything that somebody types
        for name, stacked in drawn.items():
            stacked.add(_call(name, sources[name], t, steps))

    def side(name: str, source: Any) -> Batch:
        return drawn[name].whole() if name in drawn else source.steps(first, steps)

    return Window(*(side(name, source) for name, source in sources.items()))


def fetch(resident: Window, window: Window) -> Window:
    """Batches in place of indices, for the sides of the window that have a resident data set."""
    sides = zip(resident, window, strict=True)
    return Window(*(side if data is None else gather(data, side) for data, side in sides))


def gather(data: PyTree, indices: PyTree) -> PyTree:
    """The examples of a resident data set named by an index array of any shape, by `Picked` or
    by `Whole`, which repeats the set: inside of a program that takes single batches out again, the
    compiler makes no copies.

    >>> print(gather(jnp.array([10, 20, 30]), jnp.array([2, 0])))
    [30 10]
    """
    if isinstance(indices, Picked):
        return gather(data, indices.rows), indices.beside
    if isinstance(indices, Whole):
        lead = jnp.shape(indices.of)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, lead + jnp.shape(x)), data)
    return jax.tree.map(lambda x: jnp.asarray(x)[indices], data)


def _call(name: str, source: Any, t: int, steps: int) -> Batch:
    try:
        return as_arrays(source())
    except StopIteration:
        raise ValueError(
            f"{name} ran out of data at batch {t + 1} of {steps} of an episode: run draws "
            "T batches per episode from it. Cycle over the data (itertools.cycle, or a new "
            "permutation per epoch), or lower M or T."
        ) from None


def stack(name: str, batches: list[Batch]) -> Batch:
    """Batches on a new leading axis; `name` is who made them, for the error message."""
    stacked = _Stack(name, len(batches))
    for batch in batches:
        stacked.add(batch)
    return stacked.whole()


class _Stack:
    """Batches of one layout, each copied to its place as it comes: its source may refill it.

    NumPy stacks in a tenth of the time of `jnp.stack`; arrays on an accelerator and typed PRNG
    keys, which cannot change, stay where they are until all have come.
    """

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.count = name, steps, 0
        self.layout: Batch = None
        self.places: list[Any] = []  # for every leaf an array of `steps`, or a list

    def add(self, batch: Batch) -> None:
        if not self.count:
            if not jax.tree.leaves(batch):
                raise ValueError(
                    f"{self.name} made a batch without arrays; give a dummy, such as 0.0."
                )
            check_batch(self.name, batch)
            self.layout = jax.tree.map(_shape_of, batch)
            self.places = [self._place(x) for x in jax.tree.leaves(batch)]
        leaves = check_alike(self.name, self.layout, batch, self.count + 1)
        for place, x in zip(self.places, leaves, strict=True):
            if isinstance(place, list):
                place.append(x if isinstance(x, jax.Array) else jnp.array(x))
            else:
                place[self.count] = np.asarray(x)  # an array of JAX is no number of bfloat16
        self.count += 1

    def _place(self, x: Any) -> Any:
        if isinstance(x, jax.Array) and not on_host(x):
            return []
        return np.empty((self.steps, *np.shape(x)), jnp.result_type(x))

    def whole(self) -> Batch:
        leaves = [jnp.stack(x) if isinstance(x, list) else x for x in self.places]
        return jax.tree.unflatten(jax.tree.structure(self.layout), leaves)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))


def on_host(x: jax.Array) -> bool:
    """Whether NumPy can read an array where it is."""
    if isinstance(x, Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return all(device.platform == "cpu" for device in x.devices())
