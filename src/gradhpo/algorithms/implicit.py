"""Hypergradients of where training ends: implicit differentiation."""

import dataclasses
from collections.abc import Callable

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.estimators.implicit import implicit
from gradhpo.solvers import Solver, cg, identity, neumann, nystrom

__all__ = ["ENTRIES", "ImplicitOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImplicitOptimizer(EstimatorOptimizer):
    """Implicit differentiation at the minimum of the training loss; no path is stored.

    Cannot tune what the minimum does not depend on (learning rates, momenta, schedules) and
    refuses it at the first call (with "fixed_point" it warns). `metadata` holds `stationarity`
    (how far from a minimum), `linear_residual`, `linear_iterations` and `curvature`.

    Args:
        T: Inner steps per hypergradient; required unless `unroll_steps` is given.
        unroll_steps: Inner steps per hypergradient, if an episode is to have several.
        solver: `cg(...)`, `neumann`, `nystrom`, `identity`, `dense`, `minres`, `gmres` or
            `cgls` of `gradhpo.solvers`; by default `minres()` for the training
            loss, whose Hessian may then be singular, and `gmres()`, then `cgls()`, for others.
        condition: "training_loss", "fixed_point" or a function `(w, lam, batch)` that is zero
            where training ends.
        warm_start: Start the solver from the last solution (`cg` and `gmres` do).
        seed: Of solvers that draw (`nystrom`).

    Source:
        Pedregosa (2016), algorithm 1; Lorraine et al. (2020). See `gradhpo.estimators.implicit`.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> ridge = lambda w, lam, batch: 0.5 * (w - batch) ** 2 + 0.5 * jnp.exp(lam) * w**2
    >>> judge = lambda w, lam, batch: 0.5 * (w - batch) ** 2
    >>> opt = ImplicitOptimizer(inner_optimizer=optax.sgd(0.5), T=10)
    >>> state = opt.init(1.0, 0.0)  # the minimum is w = batch / (1 + exp(lam))
    >>> print(opt.compute_hypergradient(state, 2.0, 2.0, ridge, judge))
    0.5
    """

    unroll_steps: int | None = None
    solver: Solver | None = None
    condition: str | Callable = "training_loss"
    warm_start: bool = True
    seed: int = 0

    def estimator(self, loop: Loop = "scan") -> Estimator:
        return implicit(
            self.horizon if self.unroll_steps is None else self.unroll_steps,
            self.solver,
            condition=self.condition,
            warm_start=self.warm_start,
            seed=self.seed,
            loop=loop,
        )


_IMPLICIT = Summary(
    "implicit",
    "implicit",
    "the derivative of the minimum",
    "the solver's",
    "at the minimum",
    "penalties, sample weights, trained to convergence",
    remark=", and a solve per window",
)

ENTRIES = (
    Method(
        "implicit_cg",
        ImplicitOptimizer,
        implicit,
        "implicit differentiation, conjugate gradients",
        Example(
            problems=("at_minimum",),
            exact_on=("at_minimum",),
            not_exact_on=("outer_lam",),
            settings={"T": 2, "solver": cg(1e-12)},
        ),
        _IMPLICIT,
        settings={"solver": cg()},
        usual=True,
    ),
    Method(
        "implicit_neumann",
        ImplicitOptimizer,
        implicit,
        "implicit differentiation, 20 Neumann iterations",
        Example(
            problems=("at_minimum",),
            exact_on=("at_minimum",),
            settings={"T": 1, "solver": neumann(40, 1.0)},
        ),
        _IMPLICIT,
        settings={"solver": neumann()},
        usual=True,
    ),
    Method(
        "implicit_nystrom",
        ImplicitOptimizer,
        implicit,
        "implicit differentiation, Nystrom approximation of rank 10",
        Example(problems=("at_minimum",), not_exact_on=("at_minimum",), settings={"T": 1}),
        _IMPLICIT,
        settings={"solver": nystrom()},
    ),
    Method(
        "implicit_identity",
        ImplicitOptimizer,
        implicit,
        "implicit differentiation, curvature ignored",
        Example(
            problems=("at_minimum",),
            not_exact_on=("at_minimum",),
            settings={"T": 1, "solver": identity()},
        ),
        _IMPLICIT,
        settings={"solver": identity(0.1)},
    ),
)
