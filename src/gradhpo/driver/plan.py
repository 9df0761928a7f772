"""How far a run goes, and at which rates."""

from typing import Any, NamedTuple

from gradhpo.driver.failure import OnFailure
from gradhpo.driver.single import as_rate

__all__ = ["Plan"]


class Plan(NamedTuple):
    """How far a run goes."""

    episodes: int
    T: int | None = None  # inner steps of an episode; None: as many as come with its start
    of: int | None = None  # episodes that the decay of the rate refers to; None: those of this run
    lr_hyper: float | None = None
    lr_reptile: float = 1.0
    on_failure: OnFailure = "skip"

    def rates(self, first: int, dtype: Any) -> list[Any]:
        """The outer rate of every episode of a run that begins with episode `first`."""
        if self.lr_hyper is None:
            return [None] * self.episodes
        before, of = (0, self.episodes) if self.of is None else (first, self.of)
        return [
            as_rate(self.lr_hyper * (1 - (before + m) / of), dtype) for m in range(self.episodes)
        ]
