"""What a run does when the finite guard has rejected an update: go on, stop, or raise.

The update itself is undone in any case, inside the compiled step. Whether there was one is known
after an episode, from the counts of the state; a run that goes on does not look at them.
"""

from typing import Literal, NamedTuple, get_args

import jax
import numpy as np

from gradhpo.core.state import BilevelState
from gradhpo.core.status import Status, status_message
from gradhpo.utils.settings import check_choice

__all__ = ["OnFailure", "UpdateRejected", "Watch", "check_on_failure"]

OnFailure = Literal["skip", "stop", "raise"]


def check_on_failure(value: str) -> OnFailure:
    """One of the three policies.

    Raises:
        ValueError: it is something else.
    """
    return check_choice("on_failure", value, get_args(OnFailure))  # type: ignore[return-value]


class UpdateRejected(FloatingPointError):
    """What a run with `on_failure="raise"` raises after the episode of a rejected update.

    Attributes:
        status: What happened; where the episode has several, the most frequent.
        step: The first rejected update, as `state.step` counts them; None where an earlier episode
            had one already and this one has several updates.
        state: The state after the episode. The update is undone in it, so all of it is finite, and
            `run(error.state, ...)` goes on after that episode.
    """

    status: Status
    step: int | None
    state: BilevelState


class Watch:
    """Looks at the state after every episode for updates that were rejected."""

    def __init__(self, name: str, state: BilevelState):
        self.name = name
        self.before = _counters(state)

    def resumed(self, state: BilevelState) -> None:
        """What an earlier process has seen is known."""
        self.before = _counters(state)

    def __call__(self, state: BilevelState, spoilt: str = "") -> UpdateRejected | None:
        """What has happened since the last look; waits for the state.

        Args:
            spoilt: What batch brought a value that is not finite; "" where none is known to have.
        """
        before, after = self.before, _counters(state)
        self.before = after
        new = after.counts - before.counts
        rejected = {code: int(new[code]) for code in Status if code.rejects and new[code]}
        if not rejected:
            return None
        step = after.first_bad
        if before.first_bad >= 0:  # then it is not of this episode
            step = before.step if after.step == before.step + 1 else None
        ranked = sorted(rejected, key=lambda code: -rejected[code])
        each = ", ".join(f"{code.name} {rejected[code]}" for code in ranked)
        first = f"steps {before.step} to {after.step - 1}" if step is None else f"step {step}"
        error = UpdateRejected(
            f"{self.name}: {each} of the {after.step - before.step} updates of episode "
            f"{after.episode} were rejected, the first at {first}. {status_message(ranked[0])}."
            + (f" In the data, {spoilt}." if spoilt else "")
        )
        error.status, error.step = ranked[0], step
        return error


class _Counters(NamedTuple):
    counts: np.ndarray
    first_bad: int  # step of the first rejection since `init`
    step: int
    episode: int


def _counters(state: BilevelState) -> _Counters:
    numbers = state.metadata["first_bad_step"], state.step, state.episode
    counts, numbers = jax.device_get((state.counts, numbers))
    return _Counters(counts, *map(int, numbers))
