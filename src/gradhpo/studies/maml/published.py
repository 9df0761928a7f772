"""Errors on sinusoids that others report, to be held against those of the study `maml`.

Source:
    Finn: Finn et al. (2017), read by eye from the figures of the errors over gradient steps, so
    good for a tenth at best. Li: Li et al. (2017), "Meta-SGD", table 1, trained and tested with the
    same number of points, meta-batches of 4 tasks. Park: Park & Oliva (2019), "Meta-Curvature",
    table 1. Li and Park are cited from memory.
"""

from typing import NamedTuple

__all__ = ["PUBLISHED", "Published"]


class Published(NamedTuple):
    """A mean squared error; `half` of its 95 % interval, None where none is given."""

    source: str
    method: str
    shots: int
    steps: int  # of gradient descent on the task
    mse: float
    half: float | None


PUBLISHED: tuple[Published, ...] = tuple(
    Published(*row)
    for row in (
        ("Finn", "maml", 5, 1, 0.7, None),
        ("Finn", "maml", 5, 9, 0.35, None),
        ("Finn", "maml", 10, 1, 0.45, None),
        ("Finn", "maml", 10, 9, 0.15, None),
        ("Park", "maml", 5, 1, 0.686, 0.070),
        ("Park", "maml", 10, 1, 0.435, 0.039),
        ("Park", "meta_sgd", 5, 1, 0.482, 0.061),
        ("Park", "meta_sgd", 10, 1, 0.258, 0.026),
        ("Li", "maml", 5, 1, 1.13, 0.18),
        ("Li", "maml", 10, 1, 0.77, 0.11),
        ("Li", "maml", 20, 1, 0.48, 0.08),
        ("Li", "meta_sgd", 5, 1, 0.90, 0.16),
        ("Li", "meta_sgd", 10, 1, 0.53, 0.09),
        ("Li", "meta_sgd", 20, 1, 0.31, 0.05),
    )
)
