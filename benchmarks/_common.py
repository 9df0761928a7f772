"""What the benchmarks share: taking turns, processor seconds, counts of compiled programs.

Times are processor seconds of candidates that take turns, and ratios are taken within a
round, so that a busy machine hits all alike. Counts (flops, temporary bytes) come from the
compiler and are the same every time. JAX is imported late: peers without it use this too.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "Row",
    "arguments",
    "bytes_moved",
    "compiled",
    "flops",
    "machine",
    "race",
    "ratio",
    "show",
    "temp",
]

MIB = 2**20


class Row(NamedTuple):
    """One measured number, and what it should be at most."""

    candidate: str
    quantity: str
    value: float | str
    bar: float | None = None


def arguments(description: str, **flags: str) -> argparse.Namespace:
    """The command line of a benchmark; `--core` takes effect before JAX makes its threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times every candidate runs")
    parser.add_argument("--core", type=int, help="use this processor core only")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see whether it runs")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    if args.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    return args


def compiled(function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The executable for these arguments (arrays or their shapes); nothing is run."""
    import jax

    return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def flops(executable: Any) -> float:
    """Floating-point operations by the compiler's count, the body of a loop counted once."""
    return float(executable.cost_analysis()["flops"])


def bytes_moved(executable: Any) -> float:
    """Bytes that are read and written, by the compiler's count, the body of a loop counted once."""
    return float(executable.cost_analysis()["bytes accessed"])


def temp(executable: Any) -> int:
    """Bytes the program needs beside its arguments and results."""
    return executable.memory_analysis().temp_size_in_bytes


def race(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every candidate in every round, after one call to warm up.

    A candidate returns only when its result is there.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def show(title: str, rows: list[Row]) -> None:
    """A table, with a verdict where there is a bar."""
    print(f"\n{title}")
    print(f"  {'':34s} {'':30s} {'measured':>10s} {'bar':>8s}")
    for name, quantity, value, bar in rows:
        text = value if isinstance(value, str) else f"{value:.4g}"
        verdict = (
            "" if bar is None or isinstance(value, str) else ("met" if value <= bar else "NOT MET")
        )
        limit = "" if bar is None else f"<= {bar:g}"
        print(f"  {name:34s} {quantity:30s} {text:>10s} {limit:>8s} {verdict}".rstrip(), flush=True)


def machine() -> str:
    """Versions, processor and load: a time means nothing without them."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"jax {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()}, "
        f"{platform.machine()}, {cores} of {os.cpu_count()} cores{load}"
    )
