"""The command `gradhpo`: run a study, show its table again, list what there is."""

import linecache
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradhpo.checkpoint.errors import CheckpointError
from gradhpo.datasets.dataset import DatasetError
from gradhpo.driver.failure import UpdateRejected
from gradhpo.utils._interrupts import INTERRUPTED, TERMINATED, Terminated, prompt_interrupts
from gradhpo.utils.logging import printable

if TYPE_CHECKING:
    from gradhpo.report import StudyResult

__all__ = ["main"]

USAGE = """\
usage: gradhpo COMMAND ...

  gradhpo demo [--out DIR] ...       compare the methods on a small problem
  gradhpo list                       studies and methods, a line each
  gradhpo run STUDY [--out DIR] ...  run a study, print its table, write its files; with --resume
                                     go on with one that was cut off
  gradhpo report DIR                 print the table of an earlier run again
  gradhpo init [FILE] ...            write a short file with a task, to start from
  gradhpo doctor MODULE:NAME ...     what is wrong with a task of your own, which method suits it
  gradhpo tune MODULE:NAME ...       tune a task of your own, keep what is found; with --resume go
                                     on with what was cut off, and so with compare
  gradhpo compare MODULE:NAME ...    methods on it, each for the same number of gradients
  gradhpo --version

`gradhpo COMMAND --help` and `gradhpo run STUDY --help` show all options.

exit status: 0 done; 1 failed (data, disk, settings that do not fit; doctor found faults); 2 wrong
command line or a missing extra; 130 interrupted; 143 terminated. With GRADHPO_TRACEBACK=1 in the
environment an error shows where it arose; a bug always does."""


class UsageError(Exception):
    """The command line itself is wrong."""


class FaultsFound(Exception):
    """`gradhpo doctor` has found some, and said so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: The arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        0 when done, 1 when something failed, 2 for a wrong command line or a missing extra, 130
        when interrupted, 143 when terminated; one line on stderr says what. What leaves this
        function as an exception is a bug. Where `argv` is None, as in the installed command, Ctrl-C
        and SIGTERM end the process itself, `tune` and `compare` the second time.

    Raises:
        SystemExit: with status 0 or 2, after the help or an error of a command's options.

    >>> main(["run", "no such study"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # A session or notebook that calls this outlives an interrupt; runs of a task keep what
        # there is, unless there is a second one.
        patience = int(arguments[:1] in (["tune"], ["compare"]))
        own = prompt_interrupts("gradhpo", patience=patience) if argv is None else nullcontext()
        with own:
            _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return 0
    except FaultsFound:
        return 1
    except UsageError as error:
        print(f"gradhpo: {error}", file=sys.stderr)
        return 2
    except Terminated:
        print("gradhpo: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("gradhpo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as in `gradhpo list | head -1`
        sys.stdout = open(os.devnull, "w")  # or the interpreter's last flush complains
        return 1
    except (
        CheckpointError,
        DatasetError,
        ImportError,
        MemoryError,
        OSError,
        TypeError,
        UpdateRejected,
        ValueError,
    ) as error:
        if os.environ.get("GRADHPO_TRACEBACK") == "1" or not _is_for_the_user(error):
            raise
        message = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"gradhpo: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ImportError) else 1


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message alone tells the user what to mend.

    A checkpoint, a data file, a disk, the memory: always. Else where a `raise` of ours refuses what
    it was given, settings or a method that does not fit. What arises under our code, in JAX, NumPy
    or Python, is a bug.
    """
    if isinstance(error, CheckpointError | DatasetError | MemoryError | OSError):
        return True
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    statement = linecache.getline(frame.f_code.co_filename, line).strip()
    return module.split(".")[0] == "gradhpo" and statement.startswith("raise ")


def _dispatch(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "--version":
        import gradhpo

        print(f"gradhpo {gradhpo.__version__}")
        return
    try:
        import tyro  # noqa: F401  (before any work: `run` would meet its absence later)
    except ImportError:
        message = 'the command line needs more packages: pip install ".[cli]"'
        raise UsageError(message) from None
    if command in ("-h", "--help"):
        print(USAGE)
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        problem = f"unknown command {command!r}" if command else "no command"
        raise UsageError(f"{problem}\n\n{USAGE}")


def _demo(options: list[str]) -> None:
    from gradhpo import report
    from gradhpo.studies.registry import load

    tutorial = load("tutorial")
    config = _parse(tutorial.DemoConfig, "gradhpo demo", options)
    again = config.out == tutorial.DemoConfig.out and _is_of_demo(config.out)
    if config.resume:
        raise UsageError("the demo takes a minute and keeps no parts: run it again.")
    for each in (config, tutorial.separated(config)):
        report.output_directory(each.out, config.overwrite or again)
    if again:
        print(f"replacing the results of an earlier demo in {config.out}")
    # It prints by itself; its last line is the last line.
    tutorial.demo(config, report.command(["demo", *options]))


def _is_of_demo(directory: Path) -> bool:
    """Whether a directory holds the results of a demo, and not of another run."""
    from gradhpo.report import read

    try:
        return read(directory).command.split()[:2] == ["gradhpo", "demo"]
    except (OSError, ValueError):
        return False


def _list(options: list[str]) -> None:
    from gradhpo.algorithms.registry import METHODS
    from gradhpo.studies.registry import STUDIES

    if options:
        raise UsageError("`gradhpo list` takes no arguments.")
    width = max(map(len, [*STUDIES, *METHODS]))
    for title, entries in {"studies": STUDIES, "methods": METHODS}.items():
        print(f"{title}:")
        for name, entry in entries.items():
            print(f"  {name:{width}}  {entry.description}")


def _run(arguments: list[str]) -> None:
    from gradhpo import report
    from gradhpo.report.drawing import require_matplotlib
    from gradhpo.report.parts import keeping
    from gradhpo.studies.registry import STUDIES, load

    name, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name not in STUDIES:
        problem = f"unknown study {name!r}" if name else "no study"
        raise UsageError(f"{problem}; the studies are: {', '.join(STUDIES)}")
    study = load(name)
    config = _parse(study.Config, f"gradhpo run {name}", options)
    require_matplotlib()
    with keeping(name, config, _show) as parts:
        if parts.finished:
            _show_finished(parts.out)
            return
        result = study.run(replace(config, overwrite=False, resume=False), progress=_show)
        seconds = result.wall_seconds + parts.seconds
        command = report.command(["run", *arguments])
        _print_and_write(replace(result, wall_seconds=seconds, command=command), parts.out)
        parts.finish()


def _show_finished(out: Path) -> None:
    from gradhpo.report import read, table

    print(table(read(out)))
    print(f"{printable(str(out))} holds this run, finished; nothing was computed")


def _print_and_write(result: "StudyResult", out: Path) -> None:
    from gradhpo import report

    written: list[Path] = []
    try:
        print(report.table(result), end="\n\n", flush=True)
    finally:  # a closed pipe costs no file, as a full disk costs no table
        try:
            for path in report.write_each(result, out):
                written.append(path)
        finally:
            for path in written:
                print(f"wrote {printable(str(path))}")


def _init(options: list[str]) -> None:
    from gradhpo.tuning.starters import InitConfig, write_starter

    config = _parse(InitConfig, "gradhpo init", options)
    path = write_starter(config)
    print(f"wrote {printable(str(path))}; tune it by: gradhpo tune {path.stem}:task")


def _tune(arguments: list[str]) -> None:
    from gradhpo import report
    from gradhpo.report.drawing import require_matplotlib
    from gradhpo.tuning.command import tune_target
    from gradhpo.tuning.config import TuneConfig
    from gradhpo.tuning.directory import opened
    from gradhpo.tuning.result import result_of

    config = _parse(TuneConfig, "gradhpo tune", arguments)
    require_matplotlib()
    with opened("tune", config, _show) as run:
        if run.finished:
            _show_finished(run.out)
            return
        tuned = tune_target(config, run, progress=_show)
        _print_and_write(result_of(config, tuned, report.command(["tune", *arguments])), run.out)
        if tuned.error is not None:
            raise tuned.error
        run.end()


def _compare(arguments: list[str]) -> None:
    from gradhpo import report
    from gradhpo.report.drawing import require_matplotlib
    from gradhpo.tuning.command import target_of
    from gradhpo.tuning.comparing import compare, figure
    from gradhpo.tuning.config import CompareConfig
    from gradhpo.tuning.directory import opened

    config = _parse(CompareConfig, "gradhpo compare", arguments)
    require_matplotlib()
    target = target_of(config)
    with opened("compare", config, _show) as run:
        if run.finished:
            _show_finished(run.out)
            return
        error = None
        try:
            result = compare(
                target.make,
                config.method,
                config.budget or 20 * config.episodes * config.steps,
                **config.length._asdict(),
                seeds=config.seeds,
                outer_rate=config.outer_rate,
                outer=config.outer,
                width=config.width,
                on_failure=config.on_failure,
                title=config.task,
                progress=_show,
                place=run.place,
            )
        except (Exception, KeyboardInterrupt) as raised:
            if not hasattr(raised, "result"):
                raise
            error, result = raised, getattr(raised, "result")  # noqa: B009  of seeds that are done
        command = report.command(["compare", *arguments])
        files = {"compare.png": lambda path: figure(result, path)}
        _print_and_write(replace(result, command=command, files=files), run.out)
        if error is not None:
            raise error
        run.end()


def _doctor(arguments: list[str]) -> None:
    from gradhpo.doctor.command import DoctorConfig, examine

    config = _parse(DoctorConfig, "gradhpo doctor", arguments)
    found = examine(config, progress=_show)
    print(found)
    if any(fault.sure for fault in found.faults):
        raise FaultsFound


def _report(arguments: list[str]) -> None:
    from gradhpo.report import read, table

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError("usage: gradhpo report DIR")
    print(table(read(arguments[0])))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "list": _list,
    "run": _run,
    "report": _report,
    "init": _init,
    "tune": _tune,
    "compare": _compare,
    "doctor": _doctor,
}


def _parse(config: type, program: str, options: list[str]) -> Any:
    """The settings from the command line: each field of the dataclass is an option."""
    import tyro

    _check_printable(options)
    # FlagCreatePairsOff: `--fast`, without a `--no-fast` that would be the default anyway.
    return tyro.cli(config, prog=program, args=options, config=(tyro.conf.FlagCreatePairsOff,))


def _check_printable(options: list[str]) -> None:
    """Refuse control characters, which a terminal would obey when tyro quotes an option, and bytes
    outside of the encoding of text, which nothing could show."""
    for option in options:
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in option):
            raise UsageError(f"an option holds a control or a broken character: {option!a:.200}")


def _show(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
