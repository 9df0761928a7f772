"""`gradhpo tune`: a task of one's own by a method, beside the same training left alone."""

import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from gradhpo.checkpoint.errors import CheckpointMismatch
from gradhpo.core.estimator import Cost
from gradhpo.report.config import Progress, silent
from gradhpo.tuning.comparing import OUTER
from gradhpo.tuning.config import TaskConfig, TuneConfig
from gradhpo.tuning.directory import RunDirectory, events
from gradhpo.tuning.history import History
from gradhpo.tuning.journal import LogRow
from gradhpo.tuning.judging import judged
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.searches import SEARCHES, require_optuna
from gradhpo.tuning.sequences import Training, at, by_search, lowest, with_trial
from gradhpo.tuning.target import Target, check_begins_anew, load
from gradhpo.tuning.training import Hook, Length, Trial, holding, left_alone, trained
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MultiLogger,
    TensorBoardLogger,
)

__all__ = ["ANEW", "UNTUNED", "Outcome", "Seed", "Tuned", "target_of", "tune_target"]

UNTUNED, ANEW = "untuned", "trained anew"


class Outcome(NamedTuple):
    """A training of one seed and how it ended, by the whole of the data."""

    trial: Trial
    judged: dict[str, float]  # val_loss, test_loss, and what the loss returns beside


class Seed(NamedTuple):
    """All trainings of one seed."""

    start: dict[str, float]  # the hyperparameters, in natural scale
    outcomes: dict[str, Outcome]  # by the name of the training; an early end may leave some out

    def whole(self, names: Collection[str]) -> bool:
        """Whether there are these trainings, none of them cut off."""
        outcomes = self.outcomes
        cut_off = any(each.trial.error is not None for each in outcomes.values())
        return not cut_off and set(names) <= outcomes.keys()


class Tuned(NamedTuple):
    """All trainings of a command."""

    seeds: list[Seed]  # that have been tuned at all
    seconds: float  # of all processes that went on with it
    error: BaseException | None  # that ended it early


def tune_target(config: TuneConfig, run: RunDirectory, progress: Progress = silent) -> Tuned:
    """Load the task, and train it for every seed.

    Args:
        run: Where the trainings are kept and logged.
        progress: Told of every training that is done.

    Returns:
        What has been tuned; where something has been before an error or Ctrl-C, that is
        `error`.

    Raises:
        TypeError, ValueError: the task, the method or a setting is wrong.
        ModuleNotFoundError: there is no such module.
        ImportError: a search without Optuna.
        KeyboardInterrupt: before anything was tuned.
    """
    target = target_of(config, once=config.alone and config.method not in SEARCHES)
    if config.method in SEARCHES or config.warm_start:
        require_optuna()
    began, seeds, error = time.monotonic(), [], None
    length = config.length.of(target.make(0))
    try:
        for number in range(config.seeds):
            seed = Seed(History(target.make(number)).start, {})
            for name, outcome in _trainings(target, number, config, length, run, progress):
                if not seed.outcomes:
                    seeds.append(seed)
                seed.outcomes[name] = outcome
                if outcome.trial.error is not None:
                    raise outcome.trial.error
    except (Exception, KeyboardInterrupt) as raised:
        if not seeds:
            raise
        error = raised
    earlier = sum(each.trial.earlier for seed in seeds for each in seed.outcomes.values())
    return Tuned(seeds, time.monotonic() - began + earlier, error)


def target_of(config: TaskConfig, *, once: bool = False) -> Target:
    """The task of a command.

    Args:
        once: Whether it is trained but once.

    Raises:
        ValueError: several seeds of a task that has none; several trainings on sources that go on.
    """
    target = load(config.task, config.set)
    if config.seeds > 1 and not target.seeded:
        raise ValueError(
            f"--seeds {config.seeds} needs a task for every seed: make {config.task} a function "
            "that takes seed and draws the weights and the order of the data by it."
        )
    if not (target.made or once):
        check_begins_anew(config.task, target.make(0))
    return target


def _trainings(
    target: Target,
    seed: int,
    config: TuneConfig,
    length: Length,
    run: RunDirectory,
    progress: Progress,
) -> Iterator[tuple[str, Outcome]]:
    """The trainings of one seed by their names, each as soon as it is done.

    The tuned one comes first: what does not fit shows there, and an interrupt costs the others.
    """

    def done(name: str, trial: Trial, found: dict[str, float]) -> tuple[str, Outcome]:
        ended = f", ended {trial.ended}" if trial.ended else ""
        values = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        progress(f"seed {seed}, {name}: {values}  ({trial.seconds:.1f} s{ended})")
        return name, Outcome(trial, found)

    by_method = _searched if config.method in SEARCHES else _tuned
    tuned = by_method(target, seed, config, length, run)
    yield done(config.method, *tuned)
    if not config.alone:
        as_long = length._replace(episodes=int(tuned.trial.state.episode))
        untouched = target.make(seed)  # made anew: sources begin at their start
        trial = left_alone(untouched, as_long, seed=seed, place=run.place(f"seed{seed}-untuned"))
        yield done(UNTUNED, trial, judged(trial))
        found = holding(target.make(seed), tuned.trial.hyperparams)
        trial = left_alone(found, as_long, seed=seed, place=run.place(f"seed{seed}-anew"))
        yield done(ANEW, trial, judged(trial))


def _tuned(
    target: Target, seed: int, config: TuneConfig, length: Length, run: RunDirectory
) -> Outcome:
    """Tuned by hypergradients."""
    named = chosen(config.method)
    method = method_of(named, length.steps)
    outer = OUTER[config.outer](named.outer_rate or config.outer_rate)
    task, state, spent, earlier = target.make(seed), None, 0.0, 0.0
    if n := config.warm_start:
        place = run.place(f"seed{seed}-probes")
        probes = by_search(target.make, "random", length, n, seed, config.width, place=place)
        place.thin(spared={0})  # by which a changed task is found out
        state, spent = at(task, method, outer, lowest(probes).drawn), probes[-1].spent
        earlier = sum(probe.earlier for probe in probes)
    place = run.place(f"seed{seed}-tuned")
    with _log(run, config, seed) as log:
        trial = trained(
            task,
            method,
            outer,
            length,
            hook=log,
            patience=config.patience,
            state=state,
            seed=seed,
            on_failure=config.on_failure,
            place=place,
        )
    cost = Cost(trial.cost.gradients + spent, trial.cost.products)
    return Outcome(trial._replace(cost=cost, earlier=trial.earlier + earlier), judged(trial))


def _searched(
    target: Target, seed: int, config: TuneConfig, length: Length, run: RunDirectory
) -> Outcome:
    """The best training of a search; after Ctrl-C or an error that of those which are done."""
    done: list[Training] = []
    began, name, error = time.monotonic(), "", None
    with _log(run, config, seed) as log:

        def seen(training: Training) -> None:
            done.append(training)
            log(LogRow(len(done), training.judged, training.done.hyperparams))

        how = (length, config.trials, seed, config.width, seen, run.place(f"seed{seed}-tuned"))
        try:
            by_search(target.make, config.method, *how)
            best = with_trial(lowest(done), target.make, length, seed)
        except CheckpointMismatch:  # no result: the directory holds another search
            raise
        except (Exception, KeyboardInterrupt) as raised:
            # What an earlier process has found counts again when the search is done.
            at_hand = [each for each in done if each.trained is not None]
            if not at_hand:
                raise
            best, error = lowest(at_hand), raised
            name = "interrupted" if isinstance(raised, KeyboardInterrupt) else "failed"
    cost, earlier = Cost(done[-1].spent, 0), sum(each.earlier for each in done)
    seconds = time.monotonic() - began + earlier
    trial = best.trial._replace(
        ended=name, error=error, cost=cost, seconds=seconds, earlier=earlier
    )
    return Outcome(trial, best.judged)


@contextmanager
def _log(run: RunDirectory, config: TuneConfig, seed: int) -> Iterator[Hook]:
    """A hook that writes every episode of a seed, or every training of a search, to new files.

    Of a training that goes on it is told all again, so that a log says the same in the end.
    """
    with ExitStack() as stack:
        logger: MultiLogger | None = None

        def hook(row: LogRow) -> None:
            nonlocal logger
            if logger is None:
                logger = stack.enter_context(_new_logs(run, config, seed))
            logger.log(row.metrics | row.hyperparams, row.step)

        yield hook


def _new_logs(run: RunDirectory, config: TuneConfig, seed: int) -> MultiLogger:
    table, lines = run.out / f"seed{seed}.csv", run.out / f"seed{seed}.jsonl"
    shown = [events(run.out, seed)] if config.tensorboard else []
    for path in [table, lines, *(path for place in shown for path in place.glob("events.*"))]:
        path.unlink(missing_ok=True)
    return MultiLogger(CSVLogger(table), JSONLinesLogger(lines), *map(TensorBoardLogger, shown))
