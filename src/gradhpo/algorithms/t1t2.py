"""T1-T2: one-step lookahead, exact or by DARTS differences."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.finite_difference import finite_difference
from gradhpo.estimators.one_step import one_step

__all__ = ["ENTRIES", "T1T2Optimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T1T2Optimizer(EstimatorOptimizer):
    """Last-step hypergradients: `dL_val/dlam + alpha_t B_t` after every inner step.

    With `inner_optimizer` the mixed product is DARTS' central difference in the weights, for
    every Optax optimizer: no second derivative, two extra training gradients. With an opaque
    `update_fn`, or `eps=None`, it is exact.

    Args:
        gamma: 0 (default) is T1-T2 as published; in (0, 1] the Jacobian is taken at the
            running average of the weights (the public package's variant; no paper has it).
        eps: "auto" takes the default displacement of the weights (1e-2 in float32,
            1e-5 max(1, ||w||) in float64), a number is that displacement, None is exact.

    Source:
        Luketina et al. (2016), section 2; Liu et al. (2019), eq. (8). See
        `gradhpo.estimators.one_step` and `gradhpo.estimators.finite_difference`.

    >>> import optax
    >>> opt = T1T2Optimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.adam(1e-2))
    >>> loss = lambda w, lam, batch: (w - batch) ** 2 + lam * w**2
    >>> judge = lambda w, lam, batch: (w - batch) ** 2
    >>> state = opt.init(1.0, 0.5)
    >>> print(f"{opt.compute_hypergradient(state, 2.0, 2.0, loss, judge):.4f}")
    0.3600
    """

    gamma: float = 0.0
    eps: float | str | None = "auto"

    def estimator(self, loop: Loop = "scan") -> Estimator:
        del loop  # one step at a time
        if isinstance(self.eps, str) and self.eps != "auto":
            raise ValueError(f"eps must be 'auto', a number or None, got {self.eps!r}.")
        radius = None if isinstance(self.eps, str) else self.eps
        by_differences = finite_difference(radius, self.gamma)  # refuses eps also where unused
        exact = self.eps is None or self.update_fn is not None
        return one_step(self.gamma) if exact else by_differences


ENTRIES = (
    Method(
        "t1t2",
        T1T2Optimizer,
        finite_difference,
        "one-step lookahead, by DARTS differences for Optax optimizers",
        Example(
            problems=("outer_lam",),
            exact_on=("ridge", "learning_rates"),
            not_exact_on=(("outer_lam", 3),),
        ),
        Summary(
            "finite difference",
            "finite_difference",
            "the same, without second derivatives",
            "$P$",
            r"as above, and $\nabla_\lambda L_{\mathrm{tr}}$ is at most quadratic in $w$",
            "losses whose second derivative is dear or missing",
        ),
        usual=True,
    ),
)
