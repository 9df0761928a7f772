"""What the programs of a method cost: one outer update, and an inner-optimization."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.loop import prepare_episode, run_episode
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import gather
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.diagnostics.flops import arithmetic
from gradhpo.meta.images import ManyShot
from gradhpo.meta.networks import MetaModel, Shape
from gradhpo.studies.shared.meta_learning import FIT_PERIOD, Schedule, meta_method, problem_of

__all__ = ["Price", "Subject", "price", "subject", "update_flops"]

CLASSES, EXAMPLES = 10, 500  # of the noise that stands for images: nothing here depends on values
OUTER_RATE = 1e-3


class Subject(NamedTuple):
    """A model and batches for it."""

    problem: Callable[[jax.Array], BilevelProblem]  # of the images, whose rows its batches are
    start: tuple[Any, Any]  # params, hyperparams
    images: jax.Array
    rows: Callable[[int], Window]  # the batches of so many steps


class Price(NamedTuple):
    """Of an inner-optimization of one task, with its share of the fits of theta."""

    flops: float  # floating-point operations of the traced programs, loops multiplied out
    temp_bytes: float  # that XLA allocates beside arguments and results, in the larger program
    seconds: float  # of the fastest of the repetitions, compiled before


def subject(model: MetaModel, shape: Shape, batch_size: int, rate: float) -> Subject:
    """Uniform noise as images, in ten classes, moved as those of `many_shot` are."""
    draw, pad = np.random.default_rng(0).integers, shape[0] // 8
    labels = np.repeat(np.arange(CLASSES), EXAMPLES)
    images = jnp.asarray(draw(0, 256, (len(labels), *shape), np.uint8))
    sample = partial(ManyShot, labels, CLASSES, EXAMPLES // 2, EXAMPLES // 2, batch_size)

    def problem(images: jax.Array) -> BilevelProblem:
        """Every loss gathers its batch, so that no program holds those of many steps."""
        dynamics, val_loss, *_ = problem_of(model, pad, rate)
        assert dynamics.parts is not None
        losses = (
            lambda w, lam, batch, loss=loss: loss(w, lam, gather(images, batch))
            for loss in (dynamics.parts.train_loss, val_loss)
        )
        train_loss, val_loss = losses
        return BilevelProblem(from_optax(train_loss, dynamics.parts.make_optimizer), val_loss)

    return Subject(
        problem,
        model.init(jax.random.key(0)),
        images,
        lambda steps: sample(steps, pad)(jax.random.key(1)),
    )


def update_flops(on: Subject, name: str, schedule: Schedule) -> float:
    """Operations of a training step and its outer update: XLA's own count of the compiled program,
    in which there is no loop. NaN for a method that looks at a whole inner-optimization."""
    estimator = meta_method(name, schedule._replace(every=1))
    if estimator.unroll_steps > 1:
        return float("nan")
    state, window = _begun(on, estimator, 1)

    def step(state: BilevelState, window: Window, images: jax.Array) -> BilevelState:
        return bilevel_step(estimator)(on.problem(images), state, window, OUTER_RATE)

    compiled = jax.jit(step).lower(state, window, on.images).compile()
    counted = compiled.cost_analysis()
    return float(counted["flops"]) if counted else float("nan")


def price(on: Subject, name: str, schedule: Schedule, repeats: int = 0) -> Price:
    """What an inner-optimization by this method costs.

    Args:
        repeats: How often it runs; 0: never, `seconds` is then NaN.
    """
    estimator = meta_method(name, schedule)
    state, window = _begun(on, estimator, schedule.steps)

    def episode(state: BilevelState, window: Window, images: jax.Array) -> BilevelState:
        return run_episode(estimator, None, on.problem(images), state, window, OUTER_RATE)

    def fit(state: BilevelState, window: Window, images: jax.Array) -> BilevelState:
        return prepare_episode(estimator, on.problem(images), state, window)

    programs = {episode: 1} | ({fit: FIT_PERIOD} if estimator.start is not None else {})
    total = Price(0.0, 0.0, 0.0)
    for program, period in programs.items():
        traced = jax.jit(program).trace(state, window, on.images)
        compiled = traced.lower().compile()
        run = partial(compiled, state, window, on.images)
        memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", float("nan"))
        total = Price(
            total.flops + float(arithmetic(traced.jaxpr)[0]) / period,
            max(total.temp_bytes, float(memory)),
            total.seconds + _seconds(run, repeats) / period,
        )
    return total


def _begun(on: Subject, estimator: Estimator, steps: int) -> tuple[BilevelState, Window]:
    """A state to start from and the rows of all batches."""
    window = on.rows(steps)
    first = jax.tree.map(lambda x: x[: estimator.unroll_steps], window)
    return init_state(on.problem(on.images), estimator, None, *on.start, first), window


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    best = float("nan")
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        best = np.fmin(best, time.perf_counter() - begun)
    return float(best)
