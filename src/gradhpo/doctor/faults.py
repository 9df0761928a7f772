"""Faults of a task, each found by an experiment of its own.

An experiment takes the function that makes the task, or a `Patient`, and returns the faults it has
found. It runs the user's losses and steps, on a few batches.
"""

import time
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

__all__ = ["OF_TASKS", "OF_TRAINING", "UNEVEN", "Fault", "Unseen"]

UNEVEN = "a batch that recompiles"
DRAWN, DRAWING = 200, 10.0  # batches of a source that are looked at, and seconds, at most
DISTINCT = 0.9  # share of the training examples that must be, for equal ones to say something
SHARE = 0.05  # of what examples do to the loss, from which their company counts
STEP = 1e-3  # in what is stored of the hyperparameters, which a derivative should foretell
OFF = 0.5  # share of the change that it may miss


class Fault(NamedTuple):
    """What is wrong, or may be."""

    name: str
    says: str  # what was seen
    remedy: str
    sure: bool = True  # False: it may be meant so; methods are measured all the same

    def __str__(self) -> str:
        return f"{self.name}: {self.says}. {self.remedy}."


class Unseen(NamedTuple):
    """An experiment could not be made."""

    why: str


Found = Iterator[Fault | Unseen]


def connections(patient: Patient) -> Found:
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


def shapes(make: Make) -> Found:
    """Do all batches of a source have one shape? Another one is another program."""
    fresh, other = make(), make()
    until = time.monotonic() + DRAWING
    for side, source in (("train", fresh.train), ("val", fresh.val)):
        if source is None or isinstance(source, Resident | InOrder | Pool):
            continue
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
    train, val = _rows(patient, "train"), _rows(patient, "val")
    if not train or not val:
        yield Unseen("examples are drawn with the start of an episode, or have no shape in common")
        return
    if len(set(train)) < DISTINCT * len(train):
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


def finite(patient: Patient) -> Found:
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
            "The root has no derivative at zero: give Adam eps_root=1e-8; RMSProp takes its eps in "
            "the root by default",
        )
    else:
        yield Fault(
            "a derivative that is not finite",
            seen + (f"; the gradient of {dead} is exactly zero" if dead else ""),
            "Look for a root, a norm or a logarithm at zero: x / sqrt(sum x^2), log 0, 0 ** 0.5",
        )


def smoothness(patient: Patient) -> Found:
    """Does the derivative foretell a small step?"""
    if not all(np.isfinite(x).all() for _, x in _hypergradient(_exact(patient))):
        yield Unseen("derivatives are not finite")
        return
    if (missed := _missed(patient)) > OFF:
        yield Fault(
            "chaotic training",
            f"a step of {STEP} in the hyperparameters changes the validation loss after "
            f"{patient.steps} steps otherwise than its derivative says, by {missed:.0%} of it",
            "The hypergradient says little over so many steps: lower the learning rate where it "
            "starts, shorten the episode, or take a short-sighted method (one_step) or pes",
        )


OF_TASKS: dict[str, Callable[[Make], Found]] = {
    "the batches of a source have one shape": shapes,
    "there is one problem for all seeds": problems,
}
"""Experiments that come before any training, by what holds where they find nothing."""

OF_TRAINING: dict[str, Callable[[Patient], Found]] = {
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


def _rows(patient: Patient, side: str) -> list[bytes]:
    """The examples of a side that are seen, inputs and labels, by their bytes."""
    source = getattr(patient.task, side)
    if isinstance(source, Pool) or source is None:
        return []  # who is in which part is drawn with the episode
    lead = 1 if isinstance(source, Resident) else 2
    tree = source.data if isinstance(source, Resident) else getattr(patient.window, side)
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    sizes = [np.shape(x)[:lead] for x in arrays if np.ndim(x) >= lead]
    if not sizes:
        return []
    common = max(set(sizes), key=sizes.count)
    arrays = [np.asarray(x) for x in arrays if np.shape(x)[:lead] == common]
    plain = [
        (x.astype(np.float32) if x.dtype.kind == "f" else x).reshape(int(np.prod(common)), -1)
        for x in arrays
    ]
    return [b"".join(x.tobytes() for x in row) for row in zip(*plain, strict=True)]


def _short(shape: Any) -> str:
    found = jax.tree.leaves(shape, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
    return ", ".join(f"{dtype}{list(size)}" for size, dtype in found[:3])
