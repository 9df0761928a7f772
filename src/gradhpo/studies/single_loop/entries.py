"""What is compared: six estimators, what an update of each costs, and the rates found for them."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from gradhpo.core.estimator import Estimator
from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.f2sa import f2sa
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.saba import saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.solvers import cg

__all__ = ["ENTRIES", "GRID", "PRODUCT", "RATES", "Entry", "cost", "steps_of"]

STEPS = 10  # of the methods with a window, on the weights and on the linear system alike
PRODUCT = 2  # gradients that a second-order product counts as
INNER_RATES = (0.05, 0.1, 0.2)
OUTER_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
GRID = tuple(itertools.product(INNER_RATES, OUTER_RATES))


class Entry(NamedTuple):
    """A method of this study and its price per outer update."""

    make: Callable[[Any, int, int], Estimator]  # (inner rate, parts of train, of val)
    window: int
    gradients: int
    products: int


ENTRIES = {
    "soba": Entry(lambda rate, n, m: soba(rate), 1, 2, 1),
    "saba": Entry(lambda rate, n, m: saba(n, m, rate), 1, 2, 1),
    "amigo": Entry(lambda rate, n, m: amigo(STEPS, STEPS, rate), STEPS, STEPS + 1, STEPS + 1),
    "stocbio": Entry(lambda rate, n, m: stocbio(STEPS, STEPS, rate), STEPS, STEPS + 1, STEPS + 1),
    "f2sa": Entry(lambda rate, n, m: f2sa(STEPS), STEPS, 3 * STEPS + 3, 0),
    "implicit_cg": Entry(
        lambda rate, n, m: implicit(STEPS, cg(max_iterations=STEPS)), STEPS, STEPS + 2, STEPS + 3
    ),
}

RATES: dict[str, dict[str, tuple[float, float]]] = {
    "ijcnn1": {
        "soba": (0.2, 1.0),
        "saba": (0.2, 1.0),
        "amigo": (0.2, 10.0),
        "stocbio": (0.1, 30.0),
        "f2sa": (0.2, 10.0),
        "implicit_cg": (0.1, 3.0),
    }
}


def steps_of(method: str, budget: float) -> int:
    """Inner steps that a budget of gradients pays for, in whole windows."""
    entry = ENTRIES[method]
    return round(budget / (entry.gradients + PRODUCT * entry.products)) * entry.window


def cost(method: str, budget: float, points: int) -> tuple[int, int]:
    """Gradient evaluations and second-order products of a run in parts (of `cg`, at most)."""
    entry = ENTRIES[method]
    updates = steps_of(method, budget / points) // entry.window * points
    return updates * entry.gradients, updates * entry.products
