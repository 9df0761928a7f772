"""HyperDistill: online hypergradient distillation."""

import dataclasses
from typing import Any

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.method import Example, Method, Summary
from gradhpo.core.episode import ON_HOST
from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.problem import Window
from gradhpo.core.source import stack
from gradhpo.core.state import BilevelState
from gradhpo.core.types import Batch, LossFn
from gradhpo.driver._programs import programs
from gradhpo.driver.setup import resolve
from gradhpo.estimators.distill import has_examples, hyperdistill
from gradhpo.utils.arrays import as_arrays
from gradhpo.utils.settings import check_count
from gradhpo.utils.validation import leaves_with_names

__all__ = ["ENTRIES", "OnlineHypergradientOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineHypergradientOptimizer(EstimatorOptimizer):
    """HyperDistill: `dL_val/dlam + theta S_t alpha_t dPhi(w*_t, lam; D*_t)/dlam` at every step.

    Args:
        gamma: Discount in [0, 1]; 0 with `theta=1.0` is the one-step method.
        estimation_period: Episodes between two fits of theta (before episodes 1, 1 +
            period, …); a fit costs about as much as three episodes.
        theta: "estimate" fits it; a number (or "fixed", which is 1.0) keeps it there. `step`
            never fits: theta is 1 until `run` or `estimate_theta` does.
        theta_guard: Reject a fit that is not positive or larger than training that forgets
            nothing explains (1.1 T / S_T), keep the one before, say so in the status.
        points: "line" (constant memory) or "trajectory" (eq. 17 as printed) in the fit.
        slots: "differentiated" or "ignored": whether the fit carries derivatives through the
            slots of the inner optimizer. With momentum the published numbers ask for "ignored".
        sampling: "bernoulli" or "round", how D* takes examples in.
        seed: Of those draws.

    Source:
        Lee et al. (2022), algorithms 3 and 4. See `gradhpo.estimators.distill`.

    >>> import jax.numpy as jnp
    >>> opt = OnlineHypergradientOptimizer(
    ...     update_fn=lambda w, lam, batch: w - lam * (w - batch.mean()), gamma=0.9, T=20
    ... )
    >>> judge = lambda w, lam, batch: (w - batch.mean()) ** 2
    >>> state, examples = opt.init(1.0, 0.5), jnp.full(4, 2.0)
    >>> print(opt.compute_hypergradient(state, examples, examples, judge, judge))
    -1.0
    """

    gamma: float = 0.99
    estimation_period: int = 50
    theta: float | str = "estimate"
    theta_guard: bool = True
    points: str = "line"
    slots: str = "differentiated"
    sampling: str = "bernoulli"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("estimation_period", self.estimation_period)

    def estimator(self, loop: Loop = "scan") -> Estimator:
        theta = self.theta
        if isinstance(theta, str):
            if theta not in ("estimate", "fixed"):
                raise ValueError(f"theta must be 'estimate', 'fixed' or a number, got {theta!r}.")
            theta = None if theta == "estimate" else 1.0
        return hyperdistill(
            self.gamma,
            theta=theta,
            points=self.points,
            slots=self.slots,
            sampling=self.sampling,
            theta_guard=self.theta_guard,
            seed=self.seed,
            loop=loop,
        )

    @property
    def estimation_interval(self) -> int:
        return self.estimation_period

    def remarks(self, train_batch: Batch) -> tuple[str, ...]:
        if has_examples(train_batch):
            return ()
        shapes = ", ".join(f"{name}: {x.shape}" for name, x in leaves_with_names(train_batch))
        return (
            "the distilled data D* are drawn from the examples of past batches, but the leaves of "
            f"a train batch ({shapes or 'none'}) share no leading axis to count examples by, so "
            "D* is always the current batch. Give every leaf one entry per example, or pass what "
            "all examples share in another way (closed over, or as a hyperparameter).",
        )

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: list[Batch],
        val_batch: Batch,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Fit theta for the coming episode, for a loop of your own around `step`.

        Args:
            state: At the start of an episode: its `params` are w_0.
            train_batches: The T train batches of the episode, as a list.
            val_batch: The validation batch that judges w_T.

        Returns:
            The state with `theta` (see `state.get_metric("theta")`), its fit's `theta_r2` and
            `theta_cosine`; parameters and hyperparameters are untouched.
        """
        if self.theta != "estimate":
            raise ValueError(
                f"theta is fixed (theta={self.theta!r}); construct with theta='estimate'."
            )
        if not isinstance(train_batches, list) or not train_batches:
            raise TypeError(
                "train_batches must be a non-empty list of batches, one per inner step."
            )
        batches: list[Any] = [as_arrays(batch) for batch in train_batches]
        vals = [as_arrays(val_batch)] * len(batches)
        looped = resolve(self.loop, convolves=self.loop == "host")  # as told, without a look
        fit = programs(self._setup(train_loss_fn, val_loss_fn), looped).fit
        window = Window(stack("train_batches", batches), stack("val_batch", vals))
        return fit(state, window, None, ON_HOST)


ENTRIES = (
    Method(
        "hyperdistill",
        OnlineHypergradientOptimizer,
        hyperdistill,
        "HyperDistill: online hypergradient distillation",
        Example(
            problems=("integer_leaves",),
            exact_on=(("contraction_nonlinear", 4),),
            not_exact_on=(("outer_lam", 3), "initial_scale"),
            settings={"gamma": 0.8},
            of_class={"gamma": 0.9, "estimation_period": 2},
        ),
        Summary(
            "HyperDistill",
            "hyperdistill",
            "the whole episode so far by one product",
            "$S$ + a batch",
            r"$A_t = \gamma I$, $B_t$ constant",
            "many hyperparameters, tuned online over long episodes",
            remark=", plus a fit per period",
        ),
        usual=True,
    ),
)
