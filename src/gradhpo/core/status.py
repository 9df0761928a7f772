"""What happened in a step, as a number that lives inside compiled code."""

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Status", "status_message", "status_table"]


class Status(IntEnum):
    """Codes of `state.metadata["status"]`; their order has no meaning.

    >>> Status.NONFINITE_VAL_LOSS.rejects, Status.NEGATIVE_CURVATURE.rejects
    (True, False)
    """

    OK = 0
    NONFINITE_TRAIN_STATE = 1
    NONFINITE_VAL_LOSS = 2
    NONFINITE_HYPERGRAD = 3
    NONFINITE_HYPERPARAMS = 4
    THETA_REJECTED = 5
    LINEAR_SOLVE_INACCURATE = 6
    NEGATIVE_CURVATURE = 7
    NOT_REVERSED = 8
    OUT_OF_RANGE = 9
    BUFFER_TOO_SMALL = 10
    LINEAR_SOLVE_FAILED = 11
    SINGULAR_SYSTEM = 12

    @property
    def rejects(self) -> bool:
        """Whether the hyperparameters stay as they were before the update."""
        return _MEANINGS[self].rejects

    @property
    def explains(self) -> bool:
        """Whether a method says by this code why the estimate that it returns is NaN.

        The finite guard leaves such a code in place, and the memory that the method returns:
        the method has kept out of it what was bad.
        """
        return _MEANINGS[self].explains


class _Meaning(NamedTuple):
    """What a code says."""

    happened: str
    effect: str = ""  # of that on the update
    remedy: str = ""
    rejects: bool = False
    explains: bool = False


_MEANINGS = {
    Status.OK: _Meaning("the step was taken and everything is finite"),
    Status.NONFINITE_TRAIN_STATE: _Meaning(
        "training produced NaN or infinity",
        "the step was undone: weights, slots, hyperparameters and memory are those before it",
        "Look for NaN in the train batch, or a learning rate that is too large",
        rejects=True,
    ),
    Status.NONFINITE_VAL_LOSS: _Meaning(
        "the validation loss is NaN or infinite",
        "the hyperparameters and the outer slots were left alone, and so was the memory, unless it "
        "goes with the weights (RTHO, PES)",
        "Look for NaN in the validation batch",
        rejects=True,
    ),
    Status.NONFINITE_HYPERGRAD: _Meaning(
        "the hypergradient is NaN or infinite although the losses are finite",
        "the hyperparameters, the outer slots and the memory were left alone",
        "With Adam, AMSGrad or LAMB as inner optimizer set eps_root=1e-8, with Adafactor eps=1e-8: "
        "their square root has no derivative at zero. RAdam has none in its first steps, whatever "
        "its eps_root: take another",
        rejects=True,
    ),
    Status.NONFINITE_HYPERPARAMS: _Meaning(
        "the outer optimizer produced NaN or infinity, in the hyperparameters or in its own slots",
        "the step of the outer optimizer was undone",
        "Lower the outer rate, or clip the hypergradient",
        rejects=True,
    ),
    Status.THETA_REJECTED: _Meaning(
        "HyperDistill's fitted theta (metric theta_fit) is not positive, which would reverse every "
        "update, or above 1.1 T / S_T, more than training that forgets nothing explains, or "
        "above 1 with a bad fit (metric theta_r2 below 0.7)",
        "the previous theta is kept and used",
        "With momentum give slots='ignored', or virtual=; take shorter episodes or a lower inner "
        "learning rate (theta_guard=False switches this off)",
    ),
    Status.LINEAR_SOLVE_INACCURATE: _Meaning(
        "the linear system of the implicit hypergradient is left with a relative residual above "
        "0.01 (metric linear_residual)",
        "the hypergradient was used all the same",
        "Allow more iterations, add damping, or take a smaller step in a Neumann series",
    ),
    Status.NEGATIVE_CURVATURE: _Meaning(
        "the Hessian of the training loss has negative curvature here, so this is not a minimum",
        "the hypergradient was used all the same",
        "Train longer between updates, or add damping",
    ),
    Status.NOT_REVERSED: _Meaning(
        "running training backwards did not lead back to its start bit for bit",
        "the hypergradient was discarded; the hyperparameters and the outer slots were left alone",
        "The gradient of the training loss differs between two evaluations at the same point: look "
        "for operations that are not deterministic on this device, or take "
        "reverse(memory='segments')",
        rejects=True,
        explains=True,
    ),
    Status.OUT_OF_RANGE: _Meaning(
        "reversible training left the range of its numbers: a weight, a velocity or a change of "
        "one reached 1024 or is not finite, or a momentum is not between 0 and 1",
        "the step was undone: weights, slots and hyperparameters are those before it",
        "Look for NaN in the train batch or a learning rate that is too large; rescale larger "
        "weights",
        rejects=True,
        explains=True,
    ),
    Status.BUFFER_TOO_SMALL: _Meaning(
        "the information buffer of reversible training is too small for these momenta",
        "the hypergradient was discarded; the hyperparameters and the outer slots were left alone",
        "Lower least_momentum",
        rejects=True,
        explains=True,
    ),
    Status.LINEAR_SOLVE_FAILED: _Meaning(
        "the solution found for the linear system of the implicit hypergradient is no better than "
        "u = 0 (metric linear_residual, at least 1)",
        "the hypergradient was discarded; the hyperparameters, the outer slots and the last "
        "solution were left alone (a solver that draws draws anew)",
        "Take a smaller step_size in a Neumann series (below 2 over the largest eigenvalue), more "
        "damping, or the default solver; cg and gmres break down on singular systems, which minres "
        "(for the training loss) and cgls solve. A negative metric curvature: this is no minimum, "
        "train longer between updates. A residual of NaN: the second derivatives are NaN; with "
        "Adam, AMSGrad or LAMB in a fixed point set eps_root=1e-8",
        rejects=True,
        explains=True,
    ),
    Status.SINGULAR_SYSTEM: _Meaning(
        "the linear system of the implicit hypergradient has no solution: the Hessian of the "
        "training loss is singular, and the gradient of the validation loss has a part in its null "
        "space (its share: metric linear_residual)",
        "the least-squares answer was used, in which that part has no say",
        "Train on larger batches, or add a penalty to the training loss",
    ),
}


def status_message(status: int) -> str:
    """The meaning of a status code, with the remedy.

    >>> status_message(0)
    'OK: the step was taken and everything is finite'
    """
    code = Status(int(status))
    happened, effect, remedy, *_ = _MEANINGS[code]
    said = f"{happened}; {effect}" if effect else happened
    return f"{code.name}: {said}. {remedy}" if remedy else f"{code.name}: {said}"


def status_table() -> str:
    """All codes as a table in Markdown.

    >>> print(status_table().splitlines()[2])
    | `OK` | 0 | the step was taken and everything is finite | nothing | none |
    """
    rows = [("status", "number", "what happened", "what is rejected", "remedy"), ("---",) * 5]
    for code, (happened, effect, remedy, rejects, _) in _MEANINGS.items():
        rejected = effect if rejects else f"nothing; {effect}" if effect else "nothing"
        rows.append((f"`{code.name}`", str(int(code)), happened, rejected, remedy or "none"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
