"""Experiments on the derivatives of a task: are they there, finite, and worth something?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradhpo.core import losses
from gradhpo.core.estimator import fold
from gradhpo.core.inspect import reach, started_hyperparams
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import Loop
from gradhpo.diagnostics.episode import begin_in_float64, loss_after
from gradhpo.doctor.faults import Fault, Found, Unseen
from gradhpo.doctor.patient import Patient
from gradhpo.driver.caches import cached
from gradhpo.estimators.reverse import unrolled_gradients
from gradhpo.utils._partition import merge, split
from gradhpo.utils._precision import float64
from gradhpo.utils.gradients import tree_is_finite
from gradhpo.utils.validation import leaves_with_names

__all__ = ["connections", "finite", "smoothness"]

STEP = 1e-3  # in what is stored of the hyperparameters, which a derivative should foretell
OFF = 0.5  # share of the change that it may miss


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


def _exact(patient: Patient) -> Any:
    return _unrolled(patient.problem, patient.loop)(patient.inner, patient.lam, patient.window)


@cached
def _unrolled(problem: BilevelProblem, loop: Loop) -> Callable:
    unrolled = partial(unrolled_gradients, problem, loop=loop)
    return unrolled if loop == "host" else jax.jit(unrolled)


def _hypergradient(got: Any) -> list[tuple[str, np.ndarray]]:
    total = jax.tree.map(jnp.add, got.direct, got.indirect)
    return [(name, np.asarray(x)) for name, x in leaves_with_names(total)]


def _dead(patient: Patient) -> str:
    """Leaves of the weights some of whose gradients are exactly zero in all of the window."""
    if patient.problem.reported_loss is None:
        return ""
    consts, batches = (patient.inner, patient.lam), patient.window.train
    grads = fold(_gradient, patient.problem, consts, (), batches, loop=patient.loop)[1]
    zero = jax.tree.map(lambda g: np.all(np.asarray(g) == 0, axis=0), grads)
    return ", ".join(
        f"{name} ({int(np.sum(x))} of {np.size(x)} numbers)"
        for name, x in leaves_with_names(zero)
        if np.any(x)
    )


def _gradient(problem, consts, carry, batch):
    inner, lam = consts
    floating, rest = split(inner.params)

    def value(w):
        weights, state = merge(w, rest), inner.model_state
        return losses.train(problem.reported_loss, weights, lam, batch, state).value

    return carry, jax.grad(value)(floating)


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
        unrolled = _unrolled(episode.problem, episode.loop)
        got = unrolled(episode.inner, episode.lam, episode.window)
        h = ravel_pytree(jax.tree.map(jnp.add, got.direct, got.indirect))[0]
        size = jnp.linalg.norm(h)
        if not bool(jnp.isfinite(size)) or float(size) == 0:
            return 0.0
        step = STEP * h / size
        change = float(loss(back(flat + step)) - loss(back(flat - step)))
        foretold, worth = float(2 * step @ h), 1e-3 * STEP * abs(float(got.val_loss))
    return abs(change - foretold) / max(abs(foretold), worth)  # near a minimum nothing is foretold
