"""Results of a study: intervals over seeds, `result.json`, `curves.csv` and the table.

result = StudyResult("toy", config, summarize(values, costs, baseline="fixed"), seconds)
print(table(result))
write(result, config.out)
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from gradhpo.experiments._intervals import Summary, interval, paired
from gradhpo.experiments._provenance import command, versions
from gradhpo.experiments._results import METRICS, Difference, MethodResult, StudyResult
from gradhpo.experiments._table import table

__all__ = [
    "METRICS",
    "Difference",
    "MethodResult",
    "StudyResult",
    "Summary",
    "command",
    "interval",
    "paired",
    "read",
    "summarize",
    "table",
    "versions",
    "write",
    "write_each",
]


def summarize(
    values: Mapping[str, Mapping[str, ArrayLike]],
    costs: Mapping[str, tuple[float, float]] | None = None,
    baseline: str | None = None,
) -> dict[str, MethodResult]:
    """Turn values per method, metric and seed into intervals, and compare with a baseline.

    Args:
        values: `values[method][metric]` of shape `(seeds,)`, or `(seeds, epochs)` for a metric
            in `_by_epoch`. Entry i of all methods must come from the same seed.
        costs: `(gradient_evaluations, second_order_products)` of one seed, by method.
        baseline: Method the others are compared with, in every metric with one value per seed.

    Raises:
        ValueError: unknown metric, baseline or method in `costs`, or shapes that do not fit.

    >>> both = {"fixed": {"val_loss": [2.0, 3.0]}, "t1t2": {"val_loss": [1.5, 2.5]}}
    >>> summarize(both, baseline="fixed")["t1t2"].paired_difference["val_loss"].summary.ci95
    array([-0.5, -0.5])
    """
    costs = costs or {}
    for name in [*costs, *([] if baseline is None else [baseline])]:
        if name not in values:
            raise ValueError(f"{name!r} is none of the methods: {', '.join(values)}.")
    reference = {} if baseline is None else values[baseline]
    methods = {}
    for name, metrics in values.items():
        summaries = {metric: interval(array) for metric, array in metrics.items()}
        differences = {
            metric: Difference(str(baseline), paired(array, reference[metric]))
            for metric, array in metrics.items()
            if name != baseline and metric in reference and np.ndim(array) == 1
        }
        methods[name] = MethodResult(summaries, *costs.get(name, (0, 0)), differences)
    return methods


def write(result: StudyResult, out: str | Path) -> list[Path]:
    """Write `result.json`, `curves.csv` and then `result.files` into the directory `out`.

    Creates the directory when missing. A file is complete or absent: it is written under another
    name first. Numbers that are not finite are null in the JSON file, nan or inf in the CSV file,
    which has one row per method, metric, seed (from 0) and epoch (from 1; empty for a metric
    without epochs).

    Returns:
        The paths of the files.

    Raises:
        OSError: a file cannot be written; the message names it. The others have been.
        ImportError: a figure needs Matplotlib. All that is no figure has been written.

    >>> import tempfile
    >>> result = StudyResult("toy", {}, summarize({"fixed": {"val_loss": [2.0]}}), 1.0)
    >>> [path.name for path in write(result, tempfile.mkdtemp())]
    ['result.json', 'curves.csv']
    """
    return list(write_each(result, out))


def write_each(result: StudyResult, out: str | Path) -> Iterator[Path]:
    """`write`, yielding the path of each file once it is complete.

    Every file is tried, so that a figure that cannot be drawn costs no other; the first failure
    is raised after the last file.
    """
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_json(), indent=1, allow_nan=False)
    # Puts a list of numbers on one line; no string is touched, as none holds a line break.
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda match: f"[{' '.join(match[1].split())}]", text)
    own = {"result.json": _text(text + "\n"), "curves.csv": _text(_curves(result))}
    failures: list[Exception] = []
    for name, make in {**own, **result.files}.items():
        try:
            _complete(directory / name, make)
        except Exception as error:  # of any kind: a figure is drawn by code of others
            failures.append(error)
        else:
            yield directory / name
    if failures:
        raise failures[0]


def read(out: str | Path) -> StudyResult:
    """Read the result that `write` left in a directory; null numbers come back as NaN.

    Raises:
        FileNotFoundError: the directory holds no `result.json`.
        ValueError: the file is not a result; the message says where it differs.

    >>> import tempfile
    >>> out = tempfile.mkdtemp()
    >>> _ = write(StudyResult("toy", {}, {}, wall_seconds=1.0), out)
    >>> read(out).study
    'toy'
    """
    path = Path(out) / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"no result.json in {Path(out)}; `gradhpo run` writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject)
        if not isinstance(data, dict):
            raise ValueError("the top level is not an object")
        return StudyResult.from_json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of gradhpo: {error}") from None


def _reject(token: str) -> NoReturn:
    raise ValueError(f"{token} is not JSON")


def _curves(result: StudyResult) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "metric", "seed", "epoch", "value"])
    for name, method in result.methods.items():
        for metric, summary in method.metrics.items():
            epochs = range(1, summary.mean.size + 1) if summary.mean.ndim else [""]
            for seed, values in enumerate(summary.seeds):
                for epoch, value in zip(epochs, np.atleast_1d(values).tolist(), strict=True):
                    writer.writerow([name, metric, seed, epoch, value])
    return file.getvalue()


def _text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8", newline="")


def _complete(path: Path, make: Callable[[Path], object]) -> None:
    """Write a file through a temporary neighbour, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix is a figure's format
    try:
        make(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash may leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names none
    finally:
        temporary.unlink(missing_ok=True)
