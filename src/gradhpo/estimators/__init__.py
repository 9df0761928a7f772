"""One hypergradient method per file, each a factory of an `Estimator`."""

from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.finite_difference import finite_difference
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse

__all__ = ["finite_difference", "first_order", "greedy", "hyperdistill", "one_step", "reverse"]
