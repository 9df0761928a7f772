"""One method on one window of training: its estimate, its costs, its status."""

from collections.abc import Callable
from types import MappingProxyType

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
from gradhpo.core.types import Hyper
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
    problem, inner, lam, window, origin, steps = episode
    try:
        estimator = METHODS[choice].estimator(steps) if isinstance(choice, str) else choice
        if estimator.lead:  # lam is held fixed, so the last of its windows says all
            estimator = delayed(estimator, steps - estimator.unroll_steps)
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
    compiled = traced.lower().compile()
    hypergrad, info = compiled(inner, lam, window, origin)
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
        temp_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        status=status,
        info=MappingProxyType(last),
        hypergrad=hypergrad,
    )


def _run(problem: BilevelProblem, estimator: Estimator) -> Callable:
    """`(s_0, lam, window, origin) -> (last estimate, info of all)`, lam held fixed."""

    def run(inner, lam, window, origin):
        steps = estimator.unroll_steps
        pieces = jax.tree.leaves(window)[0].shape[0] // steps

        def piece(i):  # windows made beforehand would be a copy of all the data
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * steps, steps), window)

        memory = estimator.init(inner, lam, piece(0))
        if estimator.start is not None:
            memory = estimator.start(problem, memory, inner, lam, window)

        def body(carry, i, origin=None):
            memory, inner, _ = carry
            got = estimator.estimate(problem, memory, inner, lam, piece(i), origin)
            return (got.memory, got.inner, got.hypergrad), dict(got.info)

        carry = strengthen((memory, inner, optax.tree.zeros_like(lam)))
        if origin is None or not estimator.starts:
            (_, _, hypergrad), info = lax.scan(body, carry, jnp.arange(pieces))
            return hypergrad, info
        carry, first = body(carry, 0, origin)  # the first window alone looks back at the start
        (_, _, hypergrad), info = lax.scan(body, carry, jnp.arange(1, pieces))
        return hypergrad, jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, info)

    return run


def _sentence(text: str) -> str:
    """The first sentence."""
    return " ".join(text.split()).split(". ")[0].removesuffix(".") + "."
