"""Solvers of the linear system of implicit differentiation, `u G = alpha`.

`G` is known by its product `u -> u G` alone: the Hessian of the training loss, plus
damping, or `I - A` of a fixed point. Every solver is a function
`solve(product, alpha, start, key, loop) -> Solution`; what it found is judged by one more
product, so that a solver which fails cannot look like one that worked. `implicit` refuses an
update by a solution that leaves a larger residual than none would.

The right-hand side is scaled to norm 1 and tests are relative, so `cg` and `dense` without
damping give the same answer when a loss is multiplied by 1e-6 or 1e6; a damping or a step size
is in the units of the loss.
"""

from gradhpo.solvers._system import Solution, Solver
from gradhpo.solvers.cg import cg
from gradhpo.solvers.cgls import cgls
from gradhpo.solvers.dense import dense
from gradhpo.solvers.gmres import gmres
from gradhpo.solvers.minres import minres
from gradhpo.solvers.neumann import identity, neumann
from gradhpo.solvers.nystrom import nystrom

__all__ = [
    "Solution",
    "Solver",
    "cg",
    "cgls",
    "dense",
    "gmres",
    "identity",
    "minres",
    "neumann",
    "nystrom",
]
