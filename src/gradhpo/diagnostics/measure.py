"""One method on one window of training: its estimate, its costs, its status."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.algorithms.registry import METHODS
from gradhpo.core.delay import delayed
from gradhpo.core.estimator import Estimator
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.status import Status
from gradhpo.core.step import strengthen
from gradhpo.core.types import Hyper, Loop
from gradhpo.diagnostics.episode import Episode
from gradhpo.diagnostics.flops import arithmetic
from gradhpo.diagnostics.rows import Row, compare
from gradhpo.utils.gradients import tree_is_finite

__all__ = ["measure"]


def measure(choice: Estimator | str, episode: Episode, exact: Hyper, training: float) -> Row:
    """Run a method through the window and compare its last estimate with the truth.

    Args:
        choice: The name of an entry of `METHODS`, or an estimator.
        episode: What to go through.
        exact: The exact hypergradient.
        training: Arithmetic of training alone over the window.
    """
    problem, inner, lam, window, origin, steps, _ = episode
    try:
        estimator = _estimator(choice, steps)
        if steps % estimator.unroll_steps:
            raise ValueError(
                f"its window of {estimator.unroll_steps} does not divide {steps} steps."
            )
        if estimator.tasks is not None:
            raise ValueError("it is over several tasks; check what it averages, on one.")
        traced = jax.jit(_run(problem, estimator)).trace(inner, lam, window, origin)
    except (TypeError, ValueError) as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "gradhpo" in note]
        if isinstance(error, TypeError) and not notes:
            raise
        return Row(refused=_sentence(notes[-1] if notes else str(error)))
    run, temp_bytes = _runner(choice, estimator, traced, episode)
    hypergrad, info = run(inner, lam, window, origin)
    hypergrad = jax.tree.map(np.asarray, hypergrad)
    counted = info.get("linear_iterations")
    iterations = None if counted is None else float(np.mean(counted))
    gradients, products = None, None
    if estimator.price is not None:
        size = sum(np.size(x) for x in jax.tree.leaves(lam))
        gradients, products = estimator.cost(steps, size, iterations=iterations)
    fixed, looped = arithmetic(traced.jaxpr)
    last = {name: float(np.asarray(x)[-1]) for name, x in info.items()}
    status = Status(int(last.pop("status", Status.OK)))
    if status == Status.OK and not tree_is_finite(hypergrad):
        status = Status.NONFINITE_HYPERGRAD
    return Row(
        **compare(hypergrad, exact),
        gradients=gradients,
        products=products,
        flops=float((fixed + looped * max(iterations or 0, 1)) / max(training, 1)),
        temp_bytes=temp_bytes,
        status=status,
        info=MappingProxyType(last),
        hypergrad=hypergrad,
    )


def _estimator(choice: Estimator | str, steps: int, loop: Loop = "scan") -> Estimator:
    """As chosen, or by its name."""
    estimator = METHODS[choice].estimator(steps, loop) if isinstance(choice, str) else choice
    if estimator.lead:  # lam is held fixed, so the last of its windows says all
        estimator = delayed(estimator, steps - estimator.unroll_steps, loop=loop)
    return estimator


def _runner(
    choice: Estimator | str, estimator: Estimator, traced: Any, episode: Episode
) -> tuple[Callable, int | None]:
    """What to call, and its temporary bytes: the program of all steps; or programs of single steps,
    where what a method stores between them is in no program's count."""
    if episode.loop == "host" and isinstance(choice, str):
        hosted = _estimator(choice, episode.steps, "host")
        if hosted.hosted or hosted.unroll_steps == 1:
            return _run(episode.problem, hosted, "host"), None
    compiled = traced.lower().compile()
    return compiled, getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)


def _run(problem: BilevelProblem, estimator: Estimator, loop: Loop = "scan") -> Callable:
    """`(s_0, lam, window, origin) -> (last estimate, info of all)`, lam held fixed."""
    steps = estimator.unroll_steps

    def piece(window, i):  # windows made beforehand would be a copy of all the data
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * steps, steps), window)

    def update(consts, carry, i, origin=None):
        (lam, window), (memory, inner, _) = consts, carry
        got = estimator.estimate(problem, memory, inner, lam, piece(window, i), origin)
        return (got.memory, got.inner, got.hypergrad), dict(got.info)

    if loop == "host" and not estimator.hosted:  # whose windows are loops over programs
        update = jax.jit(update)

    def run(inner, lam, window, origin):
        pieces = jax.tree.leaves(window)[0].shape[0] // steps
        consts = lam, window
        memory = estimator.init(inner, lam, piece(window, 0))
        if estimator.start is not None:
            memory = estimator.start(problem, memory, inner, lam, window)
        carry = strengthen((memory, inner, optax.tree.zeros_like(lam)))
        infos = []
        alone = pieces if loop == "host" else int(origin is not None and estimator.starts)
        for i in range(alone):  # the first window alone looks back at the start
            carry, info = update(consts, carry, i, None if i else origin)
            infos.append(jax.tree.map(lambda x: x[None], info))
        if alone < pieces:
            rest = jnp.arange(alone, pieces)
            carry, info = lax.scan(lambda carry, i: update(consts, carry, i), carry, rest)
            infos.append(info)
        return carry[2], jax.tree.map(lambda *x: jnp.concatenate(x), *infos)

    return run


def _sentence(text: str) -> str:
    """The first sentence."""
    return " ".join(text.split()).split(". ")[0].removesuffix(".") + "."
