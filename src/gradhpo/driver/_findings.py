"""A first look at a problem and a state: what does not fit, and what will have no effect."""

from typing import NamedTuple

import jax
import numpy as np

from gradhpo.core.episode import started as started_in
from gradhpo.core.inspect import (
    check_problem,
    has_convolution,
    reach,
    untrained_params,
)
from gradhpo.core.outer import as_outer
from gradhpo.core.problem import Window
from gradhpo.core.start import Origin
from gradhpo.core.state import BilevelState, empty_metadata, no_counts
from gradhpo.core.step import one_task, outer_metrics, per_task
from gradhpo.driver.setup import Setup
from gradhpo.utils.gradients import tree_last
from gradhpo.utils.validation import check_hyperparams, check_params, complain, difference

__all__ = ["Findings", "complain_of", "look"]


class Findings(NamedTuple):
    """What a look at the problem's jaxpr says; see `complain_of`."""

    ignored: list[str]  # leaves of lam whose hypergradient is identically zero
    started: list[str]  # those among them that enter the start, which the method does not see
    direct: list[str]
    judged: bool
    untrained: list[str]
    convolves: bool
    remarks: tuple[str, ...]
    metrics: tuple[str, ...]


def look(
    setup: Setup, state: BilevelState, window: Window, origin: Origin | None = None
) -> Findings:
    """Check a problem at its first call and see what it ignores; for `Setup.remember_shapes`.

    Args:
        state, window: Arrays, tracers or their shapes; nothing is computed.
        origin: What an episode of a run begins with; None for a single step, which begins none.
    """
    problem, estimator = setup.problem, setup.estimator
    _check_state(setup, state, window)
    inner, lam, window = one_task(estimator, state, window)
    metrics = check_problem(problem, inner, lam, window) + outer_metrics(setup.outer)
    batch = jax.eval_shape(tree_last, window)
    reached = reach(
        problem,
        inner,
        lam,
        batch,
        indirect=estimator.indirect,
        differentiates=estimator.differentiates,
    )
    started: list[str] = []
    if origin is not None and reached.ignored:
        moved = started_in(estimator, problem, origin, lam)
        started = [x for x in moved if x in reached.ignored]
    ignored = [x for x in reached.ignored if x not in started or not estimator.starts]
    return Findings(
        ignored,
        [x for x in started if x in ignored],
        reached.direct,
        reached.judged,
        untrained_params(problem, inner, lam, batch.train),
        has_convolution(problem, inner, lam, batch.train),
        setup.remarks(batch.train),
        metrics,
    )


def _check_state(setup: Setup, state: BilevelState, window: Window) -> None:
    """The slots and the memory must be those that the optimizer's own `init` would make."""
    name, problem, estimator = setup.name, setup.problem, setup.estimator
    remedy = (
        "Make the state by the init of the optimizer that uses it; to go on from these weights, by "
        "init(state.params, state.hyperparams)."
    )
    lam, outer = state.hyperparams, setup.outer
    check_params(state.params)
    check_hyperparams(lam)
    if missing := sorted(empty_metadata(lam).keys() - state.metadata.keys()):
        raise ValueError(f"the metadata of this state lack {missing[0]!r}. {remedy}")
    if np.shape(state.counts) != (len(no_counts()),):
        raise ValueError(
            f"the counts of this state have the shape {np.shape(state.counts)}, but there are "
            f"{len(no_counts())} statuses. {remedy}"
        )
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
        seen = jax.eval_shape(estimator.room.make, seen, window)
    if where := difference(seen, memory):
        raise ValueError(
            f"this state was made by another {name}, or for other hyperparameters: its memory "
            f"is not what this one makes ({where}). {remedy}"
        )


def complain_of(setup: Setup, findings: Findings) -> None:
    """Warn of what cannot be tuned, judged or trained (or raise)."""
    name, estimator = setup.name, setup.estimator
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
            setup.strict,
        )
    if findings.started:
        complain(
            f"{name}: the hypergradient of leaf {', '.join(findings.started)} is identically zero, "
            "because it enters the start of an episode alone, which this method takes for a "
            "constant. It will never move. Methods that see the start are reverse, reversible, "
            "forward, drmad, es and pes.",
            setup.strict,
        )
    if unused := [x for x in findings.ignored if x not in findings.started]:
        reaches = (
            "the training step or the validation loss"
            if estimator.indirect
            else "the validation loss, and a first-order method sees nothing else"
        )
        complain(
            f"{name}: the hypergradient of leaf {', '.join(unused)} is identically zero, "
            f"because it does not enter {reaches}. It will never move. Is it closed over instead "
            "of passed in, behind a stop_gradient, or is this the wrong method for it?",
            setup.strict,
        )
    if findings.untrained:
        complain(
            f"{name}: train_loss_fn has no gradient path to params leaf "
            f"{', '.join(findings.untrained)} (stop_gradient, argmax, a cast to integers?); it is "
            "not trained by this loss.",
            setup.strict,
        )
    for remark in findings.remarks:
        complain(f"{name}: {remark}", setup.strict)
