"""Every method by name: the entries of the modules of the classes, as they are to be listed."""

from gradhpo.algorithms import (
    baselines,
    discounted_sum,
    evolution,
    greedy,
    implicit,
    online,
    single_loop,
    t1t2,
    unrolled,
)
from gradhpo.algorithms.method import METHODS, Example, Method, Summary, register

__all__ = ["METHODS", "Example", "Method", "Summary", "register"]

for _module in (
    baselines,
    t1t2,
    greedy,
    online,
    unrolled,
    discounted_sum,
    implicit,
    evolution,
    single_loop,
):
    for _entry in _module.ENTRIES:
        register(_entry)
