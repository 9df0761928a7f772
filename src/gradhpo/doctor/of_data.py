"""Experiments on what a task is made of: its batches, its examples, its problem."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core import losses
from gradhpo.core.source import Pool, Resident
from gradhpo.core.task import Task
from gradhpo.datasets.loaders import Masked
from gradhpo.doctor.faults import Fault, Found, Unseen
from gradhpo.doctor.patient import Make, Patient
from gradhpo.utils.arrays import as_arrays

__all__ = ["UNEVEN", "company", "problems", "same_batches", "shapes", "shared_rows"]

UNEVEN = "a batch that recompiles"
DRAWN, DRAWING = 200, 10.0  # batches of a source that are looked at, and seconds, at most
PASS = 0.95  # share of different examples by which a pass through the data is over
DISTINCT = 0.9  # share of the training examples that must be, for equal ones to say something
SHARE = 0.05  # of what examples do to the loss, from which their company counts


def shapes(make: Make) -> Found:
    """Do all batches of a source have one shape? Another one is another program."""
    fresh, other = make(), make()
    until = time.monotonic() + DRAWING
    for side, source in _functions(fresh):
        if source is getattr(other, side):
            yield Unseen(f"the {side} source goes on; give a function that makes the task anew")
            return
        first = None
        for i in range(DRAWN):
            try:
                shape = jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), source())
            except StopIteration:
                break
            first = first or shape
            if shape != first:
                yield Fault(
                    UNEVEN,
                    f"batch {i + 1} of the {side} source is {_short(shape)}, the first "
                    f"{_short(first)}",
                    "Drop the last, shorter batch of an epoch, or fill it up and mark what is "
                    "missing by a mask in the batch",
                )
                break
            if time.monotonic() > until:
                break


def same_batches(make: Make) -> Found:
    """Does a task that is made again begin with the same batches?"""
    fresh, other = make(), make()
    for side, source in _functions(fresh):
        again = getattr(other, side)
        if source is again:
            yield Unseen(f"the {side} source goes on; give a function that makes the task anew")
            return
        try:
            first, second = [jax.tree.leaves(as_arrays(each())) for each in (source, again)]
        except StopIteration:  # the run will say so
            continue
        if not all(map(_equal, first, second)):
            yield Fault(
                "batches that differ from training to training",
                f"the {side} source of a task made anew, for the same seed, begins with another "
                "batch",
                "Shuffle by a generator that is made with the seed, in the function that makes the "
                "task: trainings and methods are compared on the same batches",
                sure=False,
            )


def problems(make: Make) -> Found:
    """Is the problem the same object for every task? Another one is compiled anew."""
    if make().problem is not make().problem:
        yield Fault(
            "a problem made anew",
            "every call of the task's function makes another BilevelProblem, whose programs are "
            "compiled again for every seed",
            "Make losses, from_optax(...) and BilevelProblem(...) once, outside of the function",
        )


def shared_rows(patient: Patient) -> Found:
    """Are validation examples training examples?"""
    columns = _columns(patient, "train"), _columns(patient, "val")
    if not all(columns):
        yield Unseen("examples are drawn with the start of an episode")
        return
    train, val = (_bytes(side) for side in _alike(*columns))
    if not train:
        yield Unseen("training and validation examples have no part of one shape and type")
        return
    once = _first_pass(train)
    if len(set(once)) < DISTINCT * len(once):
        yield Unseen("training examples repeat, so that equal ones say nothing")
        return
    known = set(train)
    both = sum(row in known for row in val)
    if both == len(val):
        name = "the validation set is the training set"
    elif both:
        name = "validation examples that are training examples"
    else:
        return
    yield Fault(
        name,
        f"{both} of {len(val)} validation examples that were seen are training examples, inputs "
        "and labels alike",
        "Split the data before sources are made (datasets.split): what is trained on cannot say "
        "how training generalizes, and every penalty would be tuned away",
    )


def company(patient: Patient) -> Found:
    """Is the loss of an example the same in another batch, and at another place in it?

    Of a sum over examples, L(ab) - L(ad) - L(cb) + L(cd) is zero for any four parts a, b, c, d.
    """
    batch = patient.batch.val
    leading = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    n = max(set(leading), key=leading.count) if leading else 0
    if n < 4:
        yield Unseen("it takes batches of at least four examples")
        return
    judge = jax.jit(partial(losses.loss_value, patient.problem.outer_loss))
    inner, lam = patient.inner, patient.lam

    def loss(*parts: int) -> float:
        rows = np.concatenate([np.arange(q, q + n // 4) for q in (n // 4 * np.array(parts))])

        def part(x):
            return x[rows] if np.ndim(x) and np.shape(x)[0] == n else x

        return float(judge(inner.params, lam, jax.tree.map(part, batch), inner.model_state))

    ab, cd, ad, cb = loss(0, 1), loss(2, 3), loss(0, 3), loss(2, 1)
    size = max(abs(ab - cd), abs(ad - cb))  # what other examples do to the loss
    rounding = 1e-4 * max(abs(ab), abs(cd))
    together, moved = abs(ab - ad - cb + cd), abs(ab - loss(1, 0))
    if moved > SHARE * size + rounding:
        yield Fault(
            "randomness in the validation loss",
            f"the same {2 * (n // 4)} examples in another order change it by {moved:.2g}",
            "Dropout is in training mode there: net.eval(), deterministic=True, inference_mode",
        )
    elif together > SHARE * size + rounding:
        yield Fault(
            "statistics that leak",
            f"examples are judged by the company they keep: that is {together:.2g} of a loss which "
            f"other examples change by {size:.2g}",
            "BatchNorm is in training mode there: use running statistics (net.eval(), train=False, "
            "inference_mode). Of a contrastive loss, or a root of a mean, it is meant so",
            sure=False,
        )


def _columns(patient: Patient, side: str) -> list[np.ndarray]:
    """The parts of the examples of a side that are seen, such as inputs and labels, (n, ...)."""
    source = getattr(patient.task, side)
    if isinstance(source, Pool) or source is None:
        return []  # who is in which part is drawn with the episode
    lead = 1 if isinstance(source, Resident) else 2
    tree = source.data if isinstance(source, Resident) else getattr(patient.window, side)
    mask = None
    if isinstance(tree, Masked):  # the places that were filled up hold copies
        tree, mask = tree
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    sizes = [np.shape(x)[:lead] for x in arrays if np.ndim(x) >= lead]
    if not sizes:
        return []
    common = max(set(sizes), key=sizes.count)
    rows = slice(None) if mask is None else np.ravel(mask)
    found = [np.asarray(x) for x in arrays if np.shape(x)[:lead] == common]
    found = [x.reshape(-1, *x.shape[lead:])[rows] for x in found]
    return [x.astype(np.float32) if x.dtype.kind == "f" else x for x in found]


def _alike(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[list, list]:
    """The parts that both have, by shape and type: training may bring row numbers or draws too."""
    pairs, left = [], list(other)
    for x in one:
        kind = x.shape[1:], x.dtype
        match = next((i for i, y in enumerate(left) if (y.shape[1:], y.dtype) == kind), None)
        if match is not None:
            pairs.append((x, left.pop(match)))
    return [x for x, _ in pairs], [y for _, y in pairs]


def _bytes(columns: list[np.ndarray]) -> list[bytes]:
    return [b"".join(x.tobytes() for x in row) for row in zip(*columns, strict=True)]


def _first_pass(rows: list[bytes]) -> list[bytes]:
    """The rows by whose end nearly all of those that differ have come: of a source that goes
    through its data again and again, the first time; of draws by chance, nearly all of them."""
    different = list(dict.fromkeys(rows))
    last = different[int(PASS * (len(different) - 1))]
    return rows[: rows.index(last) + 1]


def _functions(task: Task) -> list[tuple[str, Any]]:
    """The sources that are functions."""
    return [(side, each) for side in ("train", "val") if callable(each := getattr(task, side))]


def _equal(one: Any, other: Any) -> bool:
    if jnp.issubdtype(jnp.result_type(one), jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.array_equal(np.asarray(one), np.asarray(other))


def _short(shape: Any) -> str:
    found = jax.tree.leaves(shape, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    return ", ".join(f"{dtype}{list(size)}" for size, dtype in found[:3])
