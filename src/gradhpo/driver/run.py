"""The driver: prepare once, then episode after episode.

    a first look at the problem, one set of programs, room for kept batches      once
    for each episode:
        batches and draw            from the sources, at the position `state.drawn`
        memory <- start(memory)     every period-th, by `state.episode`
        s, lam, memory <- episode   one compiled call, or a Python loop over its updates
        phi <- (1 - r) phi + r w_T
        hooks                       callback, logger, progress line
    one summary of what went wrong                                               at the end

The state alone says where a run stands, so a run that is cut in two is the same run. Several
episodes go into one call where nothing happens on the host between them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.checkpoint.settings import Checkpoints
from gradhpo.core import episode as episodes
from gradhpo.core.problem import Window, check_window
from gradhpo.core.source import fetch
from gradhpo.core.start import Origin
from gradhpo.core.state import BilevelState
from gradhpo.core.step import strengthen, with_metrics
from gradhpo.core.types import Hyper
from gradhpo.driver._findings import complain_of, look
from gradhpo.driver._memory import memory_explained
from gradhpo.driver._programs import end_episode, programs
from gradhpo.driver._recompilation import note_shapes
from gradhpo.driver._spoilt import Spoilt
from gradhpo.driver.data import Data, Drawn, in_one
from gradhpo.driver.failure import Watch
from gradhpo.driver.hooks import Hook, Progress, StopRun, stops
from gradhpo.driver.identity import identify
from gradhpo.driver.interruption import Kept, Signals, handing_back, patient_signals
from gradhpo.driver.plan import Plan
from gradhpo.driver.saving import Saver, saving
from gradhpo.driver.setup import Loops, Setup, resolve
from gradhpo.driver.summary import summarise
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import avals
from gradhpo.utils.validation import complain

__all__ = ["run"]

MOST = np.iinfo(np.int32).max
PATIENCE = 0.25  # seconds for one call of several episodes: Ctrl-C waits for its end


def run(
    setup: Setup,
    state: BilevelState,
    plan: Plan,
    data: Data,
    hooks: tuple[Hook, ...] = (),
    progress: bool | None = None,
    natural: Callable[[Hyper], Any] | None = None,
    checkpoint: Checkpoints | None = None,
) -> BilevelState:
    """The state after `plan.episodes` more episodes; see `gradhpo.tune`."""
    kept = Kept(state)
    spoilt = Spoilt(data)
    line = Progress(plan.episodes, int(state.episode), progress, natural)
    watch = None if plan.on_failure == "skip" else Watch(setup.name, state)
    told: tuple[Any, ...] = hooks if watch is None else (*hooks, watch)
    failure, signals, last = None, Signals(), int(state.episode) + plan.episodes
    with ExitStack() as stack:
        stack.enter_context(handing_back(kept, signals))
        stack.enter_context(patient_signals(signals, terminations=checkpoint is not None))
        saver = stack.enter_context(saving(checkpoint, signals, data))
        stack.enter_context(memory_explained(setup.name, state, plan.T))
        stack.enter_context(closing(line))
        with suppress(StopRun):
            for episode, seen in _episodes(setup, kept, plan, data, spoilt, line, told, saver):
                stopped = [stops(hook, episode, seen) for hook in (*hooks, line)]
                failure = None if watch is None else watch(seen, spoilt.said)
                ends = failure is not None or any(stopped) or signals.heard is not None
                if saver is not None:
                    saver.after(kept.newest, data, last=ends or episode == last)
                if failure is not None and plan.on_failure == "raise":
                    raise failure
                if ends:
                    break
        kept.wait()
        if saver is not None:
            saver.finish()
    if failure is None:
        summarise(setup.name, kept.first, kept.good, spoilt.said)
    else:
        complain(f"{failure} The run ends here (on_failure='stop').", strict=False)
    return kept.good


def _episodes(
    setup: Setup,
    kept: Kept,
    plan: Plan,
    data: Data,
    spoilt: Spoilt,
    line: Progress,
    hooks: tuple[Any, ...],
    saver: Saver | None,
) -> Iterator[tuple[int, BilevelState]]:
    """`(episode, state with params = w_T)` after every call; the state to go on from is kept."""
    state, estimator, resident = kept.good, setup.estimator, data.resident
    first, position = int(state.episode), int(state.drawn)
    rates = plan.rates(first, scalar_dtype(state.hyperparams))
    keep_phi = plan.lr_reptile != 1
    ends = keep_phi or estimator.tasks is not None

    if saver is not None:
        data.return_to(saver.origin)
    drawn = [data.draw(position, plan.T)]
    layout, seen = avals(drawn[0]), set()
    shapes = setup.remember_shapes(_shapes, state, resident, drawn[0])
    state = _with_room(setup, state, shapes, seen)
    state, T, loops = _prepare(setup, plan, state, shapes)
    compiled = programs(setup, loops)
    done = 0
    if saver is not None:
        about = identify(setup, plan, data, kept.first, shapes.window, drawn[0])
        about["loop"] = loops.episode
        found = saver.begin(about, state, first + plan.episodes, estimator.room)
        if found is not None:
            kept.begin(found)
            _tell(hooks, found, saver.cut)
            if int(found.episode) < first + plan.episodes:
                saver.go_on()
            data.go_on(position + T, int(found.drawn), T, saver.position)
            state, done, position = found, int(found.episode) - first, int(found.drawn)
            if done == plan.episodes:
                return
            drawn, layout = [data.draw(position, plan.T)], None  # that of the latest episode
    room = 1 if keep_phi or compiled.episodes is None else data.at_once(T)
    while True:
        if avals(drawn[0]) != layout:
            layout = avals(drawn[0])
            shapes = setup.remember_shapes(_shapes, state, resident, drawn[0])
            state = _with_room(setup, state, shapes, seen)
        called, n, (window, draw) = time.monotonic(), len(drawn), drawn[0]
        with nullcontext() if done else line.compiling():
            if estimator.start is not None and (first + done) % setup.period == 0:
                state = compiled.fit(state, window, draw, resident)
            if compiled.episodes is None or room == 1:
                state = compiled.episode(
                    state, window, draw, rates[done], resident, keep_phi=keep_phi
                )
                ended = state
                if ends:
                    ended = end_episode(state, plan.lr_reptile, tasks=estimator.tasks)
            else:
                some = _padded(rates[done : done + n], room)
                windows = in_one(drawn, room)
                ended, w_T = compiled.episodes(state, np.int32(n), windows, some, resident)
                state = ended.update(**w_T)
        kept.put(ended)
        spoilt.look(window, first + done + 1)
        done, position = done + n, position + n * T
        yield first + done, state
        if done == plan.episodes:
            return

        drawn = [data.draw(position, plan.T)]
        kept.wait()  # no more than one call runs, and the next one's data are drawn meanwhile
        if room > 1 and not hooks:
            each = (time.monotonic() - called) / n
            n = min(room, plan.episodes - done, int(PATIENCE / each))
            if estimator.start is not None:
                n = min(n, setup.period - (first + done) % setup.period)
            drawn += [data.draw(position + k * T, plan.T) for k in range(1, n)]
        state = kept.good


def _with_room(setup: Setup, state: BilevelState, shapes: "Shapes", seen: set) -> BilevelState:
    """The state with room for batches of these shapes, if the method keeps some."""
    note_shapes(setup.name, seen, shapes.window, strict=False)  # the state so far is worth more
    room = setup.estimator.room
    return state if room is None else state.update(memory=room.make(state.memory, shapes.window))


class Shapes(NamedTuple):
    """What an episode looks like."""

    origin: Origin
    window: Window  # of batches


def _shapes(setup: Setup, state: BilevelState, resident: Window, drawn: Drawn) -> Shapes:
    """For `Setup.remember_shapes`.

    Raises:
        ValueError: the batches come twice, or not at all.
    """
    origin, _, own = jax.eval_shape(
        lambda state, draw: episodes.begin(setup.estimator, setup.problem, state, draw),
        state,
        drawn.draw,
    )
    window, resident = episodes.episode_data(drawn.window, own, resident)
    return Shapes(origin, jax.eval_shape(fetch, resident, window))


def _prepare(
    setup: Setup, plan: Plan, state: BilevelState, shapes: Shapes
) -> tuple[BilevelState, int, Loops]:
    """`(state, T, loops)` after a first look: a state of its final structure."""
    T = check_window(shapes.window)
    if plan.T not in (None, T):
        raise ValueError(
            f"T={plan.T}, but the windows that begin returns hold {T} steps: leave T out, or give "
            "the same."
        )
    if int(state.drawn) + plan.episodes * T > MOST:
        raise ValueError(
            f"this run would end after {int(state.drawn) + plan.episodes * T} inner steps, and "
            f"state.drawn counts no more than {MOST}: ask for fewer episodes, or go on "
            "with a state of a new init."
        )
    state = state.update(phi=())
    findings = setup.remember_shapes(look, state, shapes.window, shapes.origin)
    complain_of(setup, findings)
    state = with_metrics(strengthen(state), findings.metrics)
    return state, T, resolve(setup.loop, findings.convolves)


def _tell(hooks: tuple[Any, ...], found: BilevelState, cut: bool) -> None:
    """Hooks that want to know that a run goes on from this state; `cut`: they may have seen more of
    it."""
    for hook in hooks:
        if cut and hasattr(hook, "take_back"):
            hook.take_back(found)
        if hasattr(hook, "resumed"):
            hook.resumed(found)


def _padded(rates: list[Any], length: int) -> np.ndarray | None:
    if rates[0] is None:
        return None
    return np.concatenate([rates, np.zeros(length - len(rates), rates[0].dtype)])
