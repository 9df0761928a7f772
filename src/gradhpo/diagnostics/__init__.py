"""How far each method is from the exact hypergradient, on a problem of the user's own.

    print(check_hypergradient(task, steps))

Every method estimates the hypergradient of the same window of T training steps, in float64
and with lam held fixed. Methods that look at a window of one step, or of a few, go through
the T steps window by window, and their last estimate counts. The truth is the derivative of
the validation loss after the T steps,

    h = dL_val(s_T, lam; V_T)/dlam + sum_{t=1}^{T} alpha_T A_T ... A_{t+1} B_t
        + alpha_T A_T ... A_1 ds_0/dlam,

the last term where the start depends on lam.

Implicit and single-loop methods aim at another quantity, the hypergradient at the minimum
of the training loss; the two agree where training has converged.
"""

from gradhpo.diagnostics.check import check_hypergradient
from gradhpo.diagnostics.discrete import DiscreteGap, discrete_gap
from gradhpo.diagnostics.methods import known_methods
from gradhpo.diagnostics.rows import HypergradientCheck, Row

__all__ = [
    "DiscreteGap",
    "HypergradientCheck",
    "Row",
    "check_hypergradient",
    "discrete_gap",
    "known_methods",
]
