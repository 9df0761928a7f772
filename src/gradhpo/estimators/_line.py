"""Training that leaves behind what a walk backwards needs: its states, or only a line's ends."""

from gradhpo.core.estimator import Body
from gradhpo.utils._partition import split

__all__ = ["forwards"]


def forwards(points: str) -> Body:
    """For `fold`: a step, and of `s_{t-1}` what the line from s_0 to s_T does not give.

    `(integer leaves, model state, floating leaves)`; the last None if `points` is "line".
    """

    def forward(problem, lam, inner, batch):
        floating, rest = split((inner.params, inner.opt_state))
        kept = floating if points == "trajectory" else None
        return problem.dynamics.step(inner, lam, batch), (rest, inner.model_state, kept)

    return forward
