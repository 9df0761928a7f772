"""The files of a result: `result.json`, `curves.csv`, and those of the study."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from gradhpo.report.results import StudyResult
from gradhpo.utils._files import publish
from gradhpo.utils.logging import printable

__all__ = ["read", "write", "write_csv", "write_each"]


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
    >>> result = StudyResult("toy", {}, {}, wall_seconds=1.0)
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
            publish(directory / name, make)
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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table of a study's own, as one of `StudyResult.files` does.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.csv")
    >>> write_csv(path, ["seed", "loss"], [[0, 2.5]])
    >>> path.read_text()
    'seed,loss\\n0,2.5\\n'
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


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
                    writer.writerow([name, printable(metric), seed, epoch, value])
    return file.getvalue()


def _text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8", newline="")
