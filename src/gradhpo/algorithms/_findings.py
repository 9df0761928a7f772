"""A first look at a problem and a state: what does not fit, and what will have no effect."""

import functools
from typing import Any, NamedTuple

import jax

from gradhpo.core.estimator import Estimator, Loop
from gradhpo.core.inspect import check_problem, has_convolution, reach, untrained_params
from gradhpo.core.outer import as_outer
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.state import BilevelState
from gradhpo.core.status import status_message
from gradhpo.core.step import one_task, per_task
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import complain, difference

__all__ = [
    "Findings",
    "complain_of",
    "complain_of_rejections",
    "inspect",
    "look",
    "remembered",
    "resolve",
]

CACHED_FINDINGS = 64


class Findings(NamedTuple):
    """What a look at the problem's jaxpr says; see `complain_of`."""

    ignored: list[str]
    direct: list[str]
    judged: bool
    untrained: list[str]
    convolves: bool
    remarks: tuple[str, ...]
    metrics: tuple[str, ...]


def look(optimizer: Any, problem: BilevelProblem, state: BilevelState, window: Window) -> Findings:
    """Check a problem at its first call and see what it ignores.

    Args:
        state, window: Arrays, tracers or their shapes; nothing is computed.
    """
    estimator = optimizer.method("scan")
    _check_state(optimizer, estimator, problem, state, window)
    inner, lam, window = one_task(estimator, state, window)
    metrics = check_problem(problem, inner, lam, window)
    batch = jax.eval_shape(tree_last, window)
    return Findings(
        *reach(
            problem,
            inner,
            lam,
            batch,
            indirect=estimator.indirect,
            differentiates=estimator.differentiates,
        ),
        untrained_params(problem, inner, lam, batch.train),
        has_convolution(problem, inner, lam, batch.train),
        optimizer.remarks(batch.train),
        metrics,
    )


def _check_state(
    optimizer: Any,
    estimator: Estimator,
    problem: BilevelProblem,
    state: BilevelState,
    window: Window,
) -> None:
    """The slots and the memory must be those that the optimizer's own `init` would make."""
    name = type(optimizer).__name__
    remedy = (
        "Make the state by the init of the optimizer that uses it; to go on from these weights, by "
        "init(state.params, state.hyperparams)."
    )
    lam, outer = state.hyperparams, optimizer.outer_optimizer
    slots = jax.eval_shape(
        lambda params, lam: per_task(estimator, lambda w: problem.dynamics.init(w, lam))(params),
        state.params,
        lam,
    ).opt_state
    outer_slots = jax.eval_shape(as_outer(outer).init, lam)
    for kind, seen, wanted in (
        ("inner", state.inner_opt_state, slots),
        ("outer", state.outer_opt_state, outer_slots),
    ):
        if where := difference(seen, wanted):
            raise ValueError(
                f"this state was made for another {kind} optimizer: its {kind}_opt_state is not "
                f"what the {kind} optimizer of this {name} makes ({where}). {remedy}"
            )
    memory = jax.eval_shape(estimator.init, state.inner, lam, window)
    if type(memory) is not type(state.memory):
        raise ValueError(
            f"this state was made by another method: its memory is {type(state.memory).__name__}, "
            f"{name} needs {type(memory).__name__}. {remedy}"
        )
    seen = state.memory
    if estimator.room is not None:  # a kept batch follows the data, not the settings
        seen = estimator.room.make(seen, window)
    if where := difference(seen, memory):
        raise ValueError(
            f"this state was made by another {name}, or for other hyperparameters: its memory "
            f"is not what this one makes ({where}). {remedy}"
        )


def inspect(optimizer: Any, problem: BilevelProblem, state: BilevelState, window: Window):
    """`look`, remembered by shapes, so that a second `run` traces nothing."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: (state, window)))
    return remembered(optimizer, problem, structure, tuple(leaves))


@functools.lru_cache(maxsize=CACHED_FINDINGS)
def remembered(optimizer, problem, structure, leaves) -> Findings:
    state, window = jax.tree.unflatten(structure, leaves)
    return look(optimizer, problem, state, window)


def resolve(loop: Loop | str, findings: Findings, *, window: bool = False) -> Loop:
    """What "auto" means here: on CPU a convolution must stay out of compiled loops."""
    if loop != "auto":
        return "unroll" if window and loop == "host" else loop
    if findings.convolves and jax.default_backend() == "cpu":
        return "unroll" if window else "host"
    return "scan"


def complain_of(optimizer: Any, findings: Findings) -> None:
    """Warn of what cannot be tuned, judged or trained (or raise)."""
    name, estimator = type(optimizer).__name__, optimizer.method("scan")
    if estimator.indirect and not findings.judged:
        path, cause = "path to the weights", "a constant, or weights closed over, not passed in?"
        remedy = "Judge the weights that are passed in"
        if estimator.differentiates:
            path, cause = f"gradient {path}", f"an accuracy, argmax, stop_gradient, {cause}"
            remedy += (
                " by a differentiable loss (cross-entropy in place of accuracy), or use "
                "ESOptimizer or PESOptimizer, which need values alone"
            )
        moves = "none of them will ever move"
        if findings.direct:
            moves = f"only leaf {', '.join(findings.direct)} moves, by its own part in the loss"
            remedy += "; if no more than that is meant, FOOptimizer is enough"
        complain(
            f"{name}: val_loss_fn has no {path} ({cause}), so nothing of the training reaches the "
            f"hyperparameters: {moves}. {remedy}.",
            optimizer.strict,
        )
    if findings.ignored:
        reaches = (
            "the training step or the validation loss"
            if estimator.indirect
            else "the validation loss, and a first-order method sees nothing else"
        )
        complain(
            f"{name}: the hypergradient of leaf {', '.join(findings.ignored)} is identically zero, "
            f"because it does not enter {reaches}. It will never move. Is it closed over instead "
            "of passed in, behind a stop_gradient, or is this the wrong method for it?",
            optimizer.strict,
        )
    if findings.untrained:
        complain(
            f"{name}: train_loss_fn has no gradient path to params leaf "
            f"{', '.join(findings.untrained)} (stop_gradient, argmax, a cast to integers?); it is "
            "not trained by this loss.",
            optimizer.strict,
        )
    for remark in findings.remarks:
        complain(f"{name}: {remark}", optimizer.strict)


def complain_of_rejections(optimizer: Any, state: BilevelState, before: int, updates: int) -> None:
    """Warn where most of the updates of a run were rejected, and say why the last one was.

    Never an error, also if strict: the run is over, and its state would be lost.
    """
    rejected = int(state.metadata["n_rejected"]) - before
    if 2 * rejected <= updates:
        return
    complain(
        f"{type(optimizer).__name__}: {rejected} of the {updates} updates of this run were "
        f"rejected; the first ever at step {int(state.metadata['first_bad_step'])}. The last one's "
        f"status is {status_message(int(state.metadata['status']))}.",
        strict=False,
    )
