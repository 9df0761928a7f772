"""What happened in a step, as a number that lives inside compiled code."""

from enum import IntEnum

__all__ = ["Status", "status_message"]


class Status(IntEnum):
    """Codes of `state.metadata["status"]`; 1 to 4 reject something."""

    OK = 0
    NONFINITE_TRAIN_STATE = 1
    NONFINITE_VAL_LOSS = 2
    NONFINITE_HYPERGRAD = 3
    NONFINITE_HYPERPARAMS = 4
    THETA_REJECTED = 5
    LINEAR_SOLVE_INACCURATE = 6
    NEGATIVE_CURVATURE = 7


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
        "HyperDistill's fitted theta is not positive; the previous one is kept, because a negative "
        "theta would reverse every update (theta_guard=False switches this off)"
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
}


def status_message(status: int) -> str:
    """The meaning of a status code, with the remedy.

    >>> status_message(0)
    'OK: the step was taken and everything is finite'
    """
    code = Status(int(status))
    return f"{code.name}: {_MESSAGES[code]}"
