"""One hypergradient method per file, each a factory of an `Estimator`."""

from gradhpo.estimators.amigo import amigo
from gradhpo.estimators.discounted_sum import discounted_sum
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.evolution import es, pes
from gradhpo.estimators.f2sa import f2sa
from gradhpo.estimators.finite_difference import finite_difference
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.forward import forward, forward_sharing
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.estimators.reverse import reverse
from gradhpo.estimators.reversible import reversible
from gradhpo.estimators.saba import saba
from gradhpo.estimators.soba import soba
from gradhpo.estimators.stocbio import stocbio
from gradhpo.estimators.virtual import virtual_step

__all__ = [
    "amigo",
    "discounted_sum",
    "drmad",
    "es",
    "f2sa",
    "finite_difference",
    "first_order",
    "forward",
    "forward_sharing",
    "greedy",
    "hyperdistill",
    "implicit",
    "one_step",
    "over_tasks",
    "pes",
    "reverse",
    "reversible",
    "saba",
    "soba",
    "stocbio",
    "virtual_step",
]
