"""What run this is, by name: one that goes on from a checkpoint has to be the same.

Settings are compared by their values. Functions have none that outlives a process, so what they
compute is compared: the programs that JAX traces of them, and the arrays in these.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gradhpo.checkpoint.leaves import encoded
from gradhpo.core import episode as episodes
from gradhpo.core import losses
from gradhpo.core.loop import prepare_episode
from gradhpo.core.problem import Window, check_window
from gradhpo.core.source import InOrder, Pool, Resident
from gradhpo.core.state import BilevelState
from gradhpo.core.step import bilevel_step, one_task
from gradhpo.driver.data import Data, Drawn
from gradhpo.driver.plan import Plan
from gradhpo.driver.setup import Setup
from gradhpo.utils._jaxpr import equations

__all__ = ["digest_of", "identify", "plain_settings"]


def identify(
    setup: Setup, plan: Plan, data: Data, state: BilevelState, window: Window, drawn: Drawn
) -> dict[str, Any]:
    """Names and values, as JSON has them.

    Args:
        state: Where the run began, of its final structure.
        window: Of shapes, that of an episode.
        drawn: What its first episode takes: functions that give data are known by that alone.
    """
    decays = plan.lr_hyper is not None
    start = dataclasses.replace(state, metadata={})
    own = (None, data.resident) if data.with_start else (window, Window(None, None))
    return {
        "method": setup.name,
        **{name: value for name, value in setup.settings.items() if name not in ("T", "strict")},
        "T": check_window(window),
        "lr_hyper": plan.lr_hyper,
        "decays over": (plan.episodes if plan.of is None else plan.of) if decays else None,
        "lr_reptile": plan.lr_reptile,
        "estimation_period": setup.period,
        "start": digest_of(start)[:16],
        "first episode": int(state.episode),
        **setup.remember_shapes(_programs, state, window, plan.lr_hyper, drawn.draw, *own),
        **{f"{side} data": _source(source) for side, source in data.sides.items()},
        "data of the first episode": digest_of(_called(data, drawn))[:16],
    }


def digest_of(tree: Any) -> str:
    """SHA-256 of all leaves, with their paths and types."""
    return _sha(str([leaf for leaf, _ in encoded(tree)]))


def _source(source: Any) -> Any:
    if isinstance(source, Resident):
        batches = None if source.whole else source.batch_size
        return {"sha256": digest_of(source.data)[:16], "batch_size": batches, "seed": source.seed}
    if isinstance(source, InOrder | Pool):
        held = source.batches if isinstance(source, InOrder) else source.data
        return {"sha256": digest_of(held)[:16]}
    return "function" if callable(source) else None


def _called(data: Data, drawn: Drawn) -> Any:
    """What functions of the user's have given."""
    sides = zip(data.sides.values(), drawn.window or (None, None), strict=True)
    return [side for source, side in sides if callable(source)], drawn.draw


def _programs(
    setup: Setup,
    state: BilevelState,
    window: Window,
    rate: Any,
    draw: Any,
    drawn: Window | None,
    resident: Window,
) -> dict[str, dict[str, str]]:
    """Digests of what is computed, from its parts to the whole update, so that a change is seen
    where it was made. Arguments are shapes; `drawn` and `resident` are what a fit gets."""
    problem, estimator = setup.problem, setup.estimator
    cut = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((estimator.unroll_steps, *x.shape[1:]), x.dtype), window
    )
    inner, lam, one = one_task(estimator, state, cut)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), one)

    def step(inner, lam, batch):
        return problem.dynamics.step(inner, lam, batch)

    def judge(inner, lam, batch):
        return losses.loss_value(problem.outer_loss, inner.params, lam, batch, inner.model_state)

    def update(state, window):
        return bilevel_step(estimator, setup.outer)(
            problem, state, window, None if rate is None else 1.0
        )

    def begin(state, draw):
        return episodes.begin(estimator, problem, state, draw)[1:]

    def fit(state, window, draw, resident):
        return prepare_episode(estimator, problem, state, window, draw, resident).memory

    found = {
        "training step": _text(step, inner, lam, batch.train),
        "validation loss": _text(judge, inner, lam, batch.val),
        "start of an episode": _text(begin, state, draw),
        "update": _text(update, state, cut),
    }
    if estimator.start is not None:
        found["fit"] = _text(fit, state, drawn, draw, resident)
    return {"programs": found}


CHANGING = re.compile(r" at 0x[0-9a-f]+|\b(?:name|policy)=[^\n]*")
"""What the text of a program says of functions: where they lie, and names that may be of sets."""


def _text(function: Any, *arguments: Any) -> str:
    closed = jax.make_jaxpr(function)(*arguments)
    text = CHANGING.sub("", str(closed.jaxpr))
    return _sha(text + digest_of(list(_constants(closed))))[:16]


def _constants(closed: Any) -> Iterator[Any]:
    """Arrays that functions close over."""
    yield from closed.consts
    for equation in equations(closed.jaxpr):
        for value in equation.params.values():
            yield from getattr(value, "consts", ())
        for variable in equation.invars:
            if np.ndim(getattr(variable, "val", 0)):
                yield variable.val


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain_settings(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, words or nothing."""
    fields = {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings)}
    return {k: v for k, v in fields.items() if v is None or isinstance(v, bool | int | float | str)}
