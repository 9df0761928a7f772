"""The command `gradhpo`: run a study, show its table again, list what there is."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradhpo.utils.logging import printable

__all__ = ["main"]

USAGE = """\
usage: gradhpo COMMAND ...

  gradhpo demo [--out DIR] ...       compare the methods on a small problem
  gradhpo list                       studies and methods, a line each
  gradhpo run STUDY [--out DIR] ...  run a study, print its table, write its files
  gradhpo report DIR                 print the table of an earlier run again
  gradhpo --version

`gradhpo demo --help` and `gradhpo run STUDY --help` show all options.
With GRADHPO_TRACEBACK=1 in the environment an error shows where it arose."""


class UsageError(Exception):
    """The command line itself is wrong, or an extra is missing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: The arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        0 when done, 1 when something failed (one line on stderr says what), 2 for a wrong
        command line or a missing extra, 130 when interrupted.

    Raises:
        SystemExit: with status 0 or 2, after the help or an error of a command's options.

    >>> main(["run", "no such study"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return 0
    except UsageError as error:
        print(f"gradhpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gradhpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `gradhpo list | head -1`
        sys.stdout = open(os.devnull, "w")  # or the interpreter's last flush complains
        return 1
    except (ImportError, OSError, ValueError) as error:
        if os.environ.get("GRADHPO_TRACEBACK") == "1":
            raise
        message = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"gradhpo: error: {message}", file=sys.stderr)
        return 1


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
    from gradhpo.experiments.registry import load
    from gradhpo.experiments.study import output_directory

    tutorial = load("tutorial")
    config = _parse(tutorial.Config, "gradhpo demo", options)
    output_directory(config.out)
    tutorial.demo(config)  # prints by itself; its last line is the last line


def _list(options: list[str]) -> None:
    from gradhpo.algorithms.registry import METHODS
    from gradhpo.experiments.registry import STUDIES

    if options:
        raise UsageError("`gradhpo list` takes no arguments.")
    width = max(map(len, [*STUDIES, *METHODS]))
    for title, entries in {"studies": STUDIES, "methods": METHODS}.items():
        print(f"{title}:")
        for name, entry in entries.items():
            print(f"  {name:{width}}  {entry.description}")


def _run(arguments: list[str]) -> None:
    from gradhpo.experiments import report
    from gradhpo.experiments.registry import STUDIES, load
    from gradhpo.experiments.study import output_directory

    name, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name not in STUDIES:
        problem = f"unknown study {name!r}" if name else "no study"
        raise UsageError(f"{problem}; the studies are: {', '.join(STUDIES)}")
    study = load(name)
    config = _parse(study.Config, f"gradhpo run {name}", options)
    out = output_directory(config.out)
    before = _modification_times(out)
    result = study.run(config, progress=_show)
    result = replace(result, command=report.command(["run", *arguments]))
    report.write(result, out)
    print(report.table(result), end="\n\n")
    for path in sorted(dict(_modification_times(out) - before)):
        print(f"wrote {printable(str(path))}")


def _report(arguments: list[str]) -> None:
    from gradhpo.experiments.report import read, table

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError("usage: gradhpo report DIR")
    print(table(read(arguments[0])))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "list": _list,
    "run": _run,
    "report": _report,
}


def _parse(config: type, program: str, options: list[str]) -> Any:
    """The settings from the command line: each field of the dataclass is an option."""
    import tyro

    # FlagCreatePairsOff: `--fast`, without a `--no-fast` that would be the default anyway.
    return tyro.cli(config, prog=program, args=options, config=(tyro.conf.FlagCreatePairsOff,))


def _show(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _modification_times(directory: Path) -> set[tuple[Path, int]]:
    files = [path for path in directory.iterdir() if path.is_file()]
    return {(path, path.stat().st_mtime_ns) for path in files}


if __name__ == "__main__":
    sys.exit(main())
