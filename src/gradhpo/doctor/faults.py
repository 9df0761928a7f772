"""Faults of a task, each found by an experiment of its own.

An experiment takes the function that makes the task, or a `Patient`, and returns the faults it has
found. It runs the user's losses and steps, on a few batches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradhpo.core import losses
from gradhpo.core.inspect import reach, started_hyperparams
from gradhpo.core.source import InOrder, Pool, Resident
from gradhpo.diagnostics.episode import begin_in_float64, loss_after
from gradhpo.doctor.patient import Make, Patient
from gradhpo.estimators.reverse import unrolled_gradients
from gradhpo.utils._partition import merge, split
from gradhpo.utils._precision import float64
from gradhpo.utils.gradients import tree_is_finite
from gradhpo.utils.validation import leaves_with_names

__all__ = ["OF_TASKS", "OF_TRAINING", "UNEVEN", "Fault"]

UNEVEN = "a batch that recompiles"
DRAWN = 200  # batches of a source that are looked at
STEP = 1e-3  # in what is stored of the hyperparameters, which a derivative should foretell
OFF = 0.5  # share of the change that it may miss


class Fault(NamedTuple):
    """What is wrong."""

    name: str
    says: str  # what was seen
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says}. {self.remedy}."


def connections(patient: Patient) -> Iterator[Fault]:
    """Does every hyperparameter reach the validation loss, with a derivative?"""
    seen = partial(reach, patient.problem, patient.inner, patient.lam, patient.batch)
    smooth, any_way = seen(), seen(differentiates=False)
    if not smooth.judged:
        yield Fault(
            "validation loss without a derivative",
            "no derivative of val_loss reaches the weights"
            + (", though its value depends on them" if any_way.judged else ""),
            "An accuracy, an argmax or a comparison is flat almost everywhere: judge by a smooth "
            "loss (cross-entropy), and return the accuracy beside it, (loss, {'accuracy': ...})"
            if any_way.judged
            else "Does it use weights from outside instead of those that it is given?",
        )
    started = started_hyperparams(patient.problem, patient.origin, patient.lam)
    for name in smooth.ignored:
        if name in started:
            continue
        flat = name not in any_way.ignored
        yield Fault(
            f"hyperparameter {name} is not connected",
            "it is used, but only where derivatives end"
            if flat
            else "neither training nor the validation loss uses it",
            "Rounding, comparisons and stop_gradient have no derivative: relax it, or declare it "
            "spaces.integer or spaces.categorical"
            if flat
            else "Is a value from outside, closed over, used in its place? Losses and optimizer "
            "must take it from their argument hyperparams",
        )


def shapes(make: Make) -> Iterator[Fault]:
    """Do all batches of a source have one shape? Another one is another program."""
    fresh = make()
    for side, source in (("train", fresh.train), ("val", fresh.val)):
        if source is None or isinstance(source, Resident | InOrder | Pool):
            continue
        first = None
        for i in range(DRAWN):
            shape = jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype.name), source())
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


def problems(make: Make) -> Iterator[Fault]:
    """Is the problem the same object for every task? Another one is compiled anew."""
    if make().problem is not make().problem:
        yield Fault(
            "a problem made anew",
            "every call of the task's function makes another BilevelProblem, whose programs are "
            "compiled again for every seed",
            "Make losses, from_optax(...) and BilevelProblem(...) once, outside of the function",
        )


def shared_rows(patient: Patient) -> Iterator[Fault]:
    """Are validation examples training examples?"""
    train, val = _rows(patient, "train"), _rows(patient, "val")
    if not train or not val:
        return
    both = sum(row in train for row in val)
    if both == len(val):
        name = "the validation set is the training set"
    elif both:
        name = "validation examples that are training examples"
    else:
        return
    yield Fault(
        name,
        f"{both} of {len(val)} validation examples that were seen are training examples",
        "Split the data before sources are made (datasets.split): what is trained on cannot say "
        "how training generalizes, and every penalty would be tuned away",
    )


def company(patient: Patient) -> Iterator[Fault]:
    """Is the loss of an example the same in another batch?"""
    batch = patient.batch.val
    lengths = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    n = lengths.pop()
    if lengths or n < 4:
        return
    judge = jax.jit(partial(losses.loss_value, patient.problem.outer_loss))
    inner, lam = patient.inner, patient.lam

    def loss(rows: slice) -> float:
        part = jax.tree.map(lambda x: x[rows], batch)
        return float(judge(inner.params, lam, part, inner.model_state))

    half = n // 2
    whole, halves = loss(slice(0, 2 * half)), [loss(slice(half)), loss(slice(half, 2 * half))]
    near = partial(np.isclose, whole, rtol=1e-3, atol=1e-6)
    if not (near(np.mean(halves)) or near(np.sum(halves))):
        yield Fault(
            "statistics that leak",
            f"the validation loss of {2 * half} examples is {whole:.4g}, but the mean of its two "
            f"halves is {np.mean(halves):.4g}: examples are judged by the company they keep",
            "BatchNorm and Dropout are in training mode there: use running statistics (net.eval(), "
            "train=False, inference_mode)",
        )


def finite(patient: Patient) -> Iterator[Fault]:
    """Are derivatives finite where values are?"""
    got = _exact(patient)
    if not bool(jnp.isfinite(got.val_loss)) or not tree_is_finite(got.inner):
        yield Fault(
            "training diverges",
            f"within {patient.steps} steps weights or validation loss are not finite",
            "Look for a learning rate that is too large where it starts",
        )
        return
    bad = [name for name, x in _hypergradient(got) if not np.isfinite(x).all()]
    if not bad:
        return
    dead = _dead(patient)
    seen = f"the hypergradient of {', '.join(bad)} is not finite, though training is"
    if dead and (nu := _second_moments(patient)):
        yield Fault(
            "eps_root = 0 with a dead feature",
            f"{seen}; the gradient of {dead} is exactly zero, and {nu} takes a square root there",
            "The root has no derivative at zero: give Adam eps_root=1e-8",
        )
    else:
        yield Fault(
            "a derivative that is not finite",
            seen + (f"; the gradient of {dead} is exactly zero" if dead else ""),
            "Look for a root, a norm or a logarithm at zero: x / sqrt(sum x^2), log 0, 0 ** 0.5",
        )


def smoothness(patient: Patient) -> Iterator[Fault]:
    """Does the derivative foretell a small step?"""
    if not all(np.isfinite(x).all() for _, x in _hypergradient(_exact(patient))):
        return  # another fault
    if (missed := _missed(patient)) > OFF:
        yield Fault(
            "chaotic training",
            f"a step of {STEP} in the hyperparameters changes the validation loss after "
            f"{patient.steps} steps otherwise than its derivative says, by {missed:.0%} of it",
            "The hypergradient says little over so many steps: lower the learning rate where it "
            "starts, shorten the episode, or take a short-sighted method (one_step) or pes",
        )


OF_TASKS: dict[str, Callable[[Make], Iterator[Fault]]] = {
    "the batches of a source have one shape": shapes,
    "there is one problem for all seeds": problems,
}
"""Experiments that come before any training, by what holds where they find nothing."""

OF_TRAINING: dict[str, Callable[[Patient], Iterator[Fault]]] = {
    "every hyperparameter reaches the validation loss": connections,
    "training and validation share no examples": shared_rows,
    "the validation loss of an example does not depend on its batch": company,
    "training and its derivatives are finite": finite,
    "derivatives foretell a small step": smoothness,
}
"""Those that look at the first steps of training."""


def _exact(patient: Patient) -> Any:
    return _unrolled(patient.problem)(patient.inner, patient.lam, patient.window)


def _unrolled(problem: Any) -> Callable:
    return jax.jit(partial(unrolled_gradients, problem))


def _hypergradient(got: Any) -> list[tuple[str, np.ndarray]]:
    total = jax.tree.map(jnp.add, got.direct, got.indirect)
    return [(name, np.asarray(x)) for name, x in leaves_with_names(total)]


def _dead(patient: Patient) -> str:
    """Leaves of the weights some of whose gradients are exactly zero in all of the window."""
    loss = patient.problem.reported_loss
    if loss is None:
        return ""
    floating, rest = split(patient.inner.params)

    def gradient(batch):
        def value(w):
            weights, state = merge(w, rest), patient.inner.model_state
            return losses.train(loss, weights, patient.lam, batch, state).value

        return jax.grad(value)(floating)

    grads = jax.jit(lambda window: jax.lax.map(gradient, window))(patient.window.train)
    zero = jax.tree.map(lambda g: np.all(np.asarray(g) == 0, axis=0), grads)
    return ", ".join(
        f"{name} ({int(np.sum(x))} of {np.size(x)} numbers)"
        for name, x in leaves_with_names(zero)
        if np.any(x)
    )


def _second_moments(patient: Patient) -> str:
    """The optimizer's slots that are second moments, as Adam and RMSProp name them."""
    found = jax.tree_util.tree_flatten_with_path(patient.inner.opt_state)[0]
    words = {"nu": "Adam's second moment", "sum_of_squares": "AdaGrad's sum of squares"}
    names = {getattr(key, "name", None) for path, _ in found for key in path}
    return next((word for name, word in words.items() if name in names), "")


def _missed(patient: Patient) -> float:
    """The share of the change of the loss along the hypergradient that it does not foretell."""
    with float64():
        episode = begin_in_float64(patient.task.stored, patient.steps, None, None)
        loss = loss_after(episode)
        flat, back = ravel_pytree(episode.lam)
        got = _unrolled(episode.problem)(episode.inner, episode.lam, episode.window)
        h = ravel_pytree(jax.tree.map(jnp.add, got.direct, got.indirect))[0]
        size = jnp.linalg.norm(h)
        if not bool(jnp.isfinite(size)) or float(size) == 0:
            return 0.0
        step = STEP * h / size
        change = float(loss(back(flat + step)) - loss(back(flat - step)))
        foretold, worth = float(2 * step @ h), 1e-3 * STEP * abs(float(got.val_loss))
    return abs(change - foretold) / max(abs(foretold), worth)  # near a minimum nothing is foretold


def _rows(patient: Patient, side: str) -> set[bytes]:
    """Examples of a side that are seen, by the bytes of their largest array."""
    source = getattr(patient.task, side)
    if isinstance(source, Resident):
        arrays, lead = source.data, 1
    elif isinstance(source, Pool):
        return set()  # who is in which part is drawn with the episode
    else:
        arrays, lead = getattr(patient.window, side), 2
    arrays = [np.asarray(x) for x in jax.tree.leaves(arrays)]
    arrays = [x for x in arrays if x.ndim > lead]
    if not arrays:
        return set()
    largest = max(arrays, key=lambda x: x[(0,) * lead].size)
    rows = np.ascontiguousarray(largest.reshape(-1, *largest.shape[lead:]))
    return {row.tobytes() for row in rows}


def _short(shape: Any) -> str:
    found = jax.tree.leaves(shape, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    return ", ".join(f"{dtype}{list(size)}" for size, dtype in found[:3])
