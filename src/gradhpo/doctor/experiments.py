"""All experiments. Each runs the user's losses and steps, on a few batches."""

from collections.abc import Callable

from gradhpo.doctor.faults import Found
from gradhpo.doctor.of_data import company, problems, same_batches, shapes, shared_rows
from gradhpo.doctor.of_derivatives import connections, finite, smoothness
from gradhpo.doctor.patient import Make, Patient

__all__ = ["OF_TASKS", "OF_TRAINING"]

OF_TASKS: dict[str, Callable[[Make], Found]] = {
    "the batches of a source have one shape": shapes,
    "a task made anew begins with the same batches": same_batches,
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
