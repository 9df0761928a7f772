"""What happened in a step, as a number that lives inside compiled code."""

from enum import IntEnum

__all__ = ["EXPLAINED", "Status", "status_message"]


class Status(IntEnum):
    """Codes of `state.metadata["status"]`; 1 to 4 and 8 to 11 reject something."""

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


EXPLAINED = frozenset(
    {
        Status.NOT_REVERSED,
        Status.OUT_OF_RANGE,
        Status.BUFFER_TOO_SMALL,
        Status.LINEAR_SOLVE_FAILED,
    }
)
"""Codes by which a method says why the estimate that it returns is NaN. The finite guard leaves
them in place, and the method's memory too: it has kept out of it what was bad."""

_MESSAGES = {
    Status.OK: "the step was taken and everything is finite",
    Status.NONFINITE_TRAIN_STATE: (
        "training produced NaN or infinity, and the step was undone: parameters, slots and "
        "hyperparameters are those before it. Look for NaN in the train batch, or a learning rate "
        "that is too large"
    ),
    Status.NONFINITE_VAL_LOSS: (
        "the validation loss is NaN or infinite; the hyperparameters were left alone. Look for NaN "
        "in the validation batch"
    ),
    Status.NONFINITE_HYPERGRAD: (
        "the hypergradient is NaN or infinite although the losses are finite; the hyperparameters "
        "were left alone. With Adam, AMSGrad or RAdam as inner optimizer set eps_root=1e-8: their "
        "square root has no derivative at zero"
    ),
    Status.NONFINITE_HYPERPARAMS: (
        "the outer optimizer produced NaN or infinity, in the hyperparameters or in its own slots; "
        "its step was undone. Lower the outer rate, or clip the hypergradient"
    ),
    Status.THETA_REJECTED: (
        "HyperDistill's fitted theta (metric theta_fit) is not positive, which would reverse every "
        "update, or above 1.1 T / S_T, more than training that forgets nothing explains; the "
        "previous one is kept. Take shorter episodes, a lower inner learning rate or less momentum "
        "(theta_guard=False switches this off)"
    ),
    Status.LINEAR_SOLVE_INACCURATE: (
        "the linear system of the implicit hypergradient is left with a relative residual above "
        "0.01 (metric linear_residual); the hypergradient was used all the same. Allow more "
        "iterations, add damping, or take a smaller step in a Neumann series"
    ),
    Status.NEGATIVE_CURVATURE: (
        "the Hessian of the training loss has negative curvature here, so this is not a minimum; "
        "the hypergradient was used all the same. Train longer between updates, or add damping"
    ),
    Status.NOT_REVERSED: (
        "running training backwards did not lead back to its start bit for bit, so the "
        "hypergradient was discarded. The gradient of the training loss differs between two "
        "evaluations at the same point: look for operations that are not deterministic on this "
        "device, or take reverse(memory='segments')"
    ),
    Status.OUT_OF_RANGE: (
        "reversible training left the range of its numbers, and was undone: a weight, a velocity "
        "or a change of one reached 1024 or is not finite, or a momentum is not between 0 and 1. "
        "Look for NaN in the train batch or a learning rate that is too large; rescale larger "
        "weights"
    ),
    Status.BUFFER_TOO_SMALL: (
        "the information buffer of reversible training is too small for these momenta, so the "
        "hypergradient was discarded. Lower least_momentum"
    ),
    Status.LINEAR_SOLVE_FAILED: (
        "the solution found for the linear system of the implicit hypergradient is no better than "
        "u = 0 (metric linear_residual, at least 1), so the hypergradient was discarded. Take a "
        "smaller step_size in a Neumann series (below 2 over the largest eigenvalue), more "
        "damping, or the default solver; cg and gmres break down on singular systems, which "
        "minres (for the training loss) and cgls solve. A negative metric curvature: this is no "
        "minimum, train longer between updates. A residual of NaN: the second derivatives are "
        "NaN; with Adam, AMSGrad or RAdam in a fixed point set eps_root=1e-8"
    ),
    Status.SINGULAR_SYSTEM: (
        "the linear system of the implicit hypergradient has no solution: the Hessian of the "
        "training loss is singular, and the gradient of the validation loss has a part in its "
        "null space (its share: metric linear_residual). The least-squares answer was used, in "
        "which that part has no say. Train on larger batches, or add a penalty to the training "
        "loss"
    ),
}


def status_message(status: int) -> str:
    """The meaning of a status code, with the remedy.

    >>> status_message(0)
    'OK: the step was taken and everything is finite'
    """
    code = Status(int(status))
    return f"{code.name}: {_MESSAGES[code]}"
