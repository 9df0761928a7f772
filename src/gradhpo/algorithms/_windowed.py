"""What classes with several inner steps per outer update share."""

import dataclasses

from gradhpo.algorithms._facade import EstimatorOptimizer

__all__ = ["WindowedOptimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedOptimizer(EstimatorOptimizer):
    """An episode is one window unless T says otherwise."""

    unroll_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.estimator().unroll_steps * self.update_every
        self._settle(T=self._episode_length(window if self.T is None else self.T))
