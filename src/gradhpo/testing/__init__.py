"""What it takes to test a hypergradient method: problems, oracles, a conformance suite.

    from gradhpo.testing import check_estimator
    from gradhpo.testing.problems import contraction

    check_estimator(my_method(), exact_on=[contraction])

Within the package only the study `check` imports this. Exactness is judged in float64.
"""

from gradhpo.testing.compare import assert_trees_close, relative_error, unrolled_loss
from gradhpo.testing.conformance import check_estimator
from gradhpo.testing.methods import check_method
from gradhpo.utils.finite_differences import central_difference, richardson

__all__ = [
    "assert_trees_close",
    "central_difference",
    "check_estimator",
    "check_method",
    "relative_error",
    "richardson",
    "unrolled_loss",
]
