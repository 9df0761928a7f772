"""A study's result as aligned plain text."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gradhpo.report.intervals import Summary
from gradhpo.report.results import MethodResult, StudyResult
from gradhpo.utils.logging import printable

__all__ = ["table"]

_HEADER = ("method", "mean", "95 % interval", "difference", "95 % interval", "", "to")
_COSTS = ("gradients", "2nd-order products")
_LEFT = ("method", "", "to")  # columns of words; numbers stand on the right


def table(result: StudyResult) -> str:
    """One block per metric and in it a row per method, as ASCII text without a final newline.

    A row shows the mean over seeds, its 95 % interval, the paired difference to a baseline
    with its interval, and what one seed cost: gradient evaluations and second-order products.
    A metric recorded only by epoch is shown at its last epoch; nan is a run that diverged.

    >>> from gradhpo.report import summarize
    >>> losses = {"fixed": {"val_loss": [2.0, 3.0]}, "t1t2": {"val_loss": [1.5, 2.5]}}
    >>> print(table(StudyResult("toy", {}, summarize(losses), wall_seconds=1.0)))
    toy: mean and 95 % interval over 2 seeds
    <BLANKLINE>
    val_loss (lower is better)
    method  mean  95 % interval  gradients  2nd-order products
    fixed    2.5    [-3.9, 8.9]          0                   0
    t1t2     2.0    [-4.4, 8.4]          0                   0
    """
    metrics = dict.fromkeys(name for method in result.methods.values() for name in method.metrics)
    summaries = [each for method in result.methods.values() for each in method.metrics.values()]
    counts = sorted({len(summary.seeds) for summary in summaries})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:])) or "no"
    title = f"{result.study}: mean and 95 % interval over {seeds} seed{'s' * (seeds != '1')}"
    if any(method.paired_difference for method in result.methods.values()):
        title += "; * where the interval of the paired difference excludes 0"
    blocks = [
        _block(metric, {n: m for n, m in result.methods.items() if metric in m.metrics})
        for metric in metrics
        if not (metric.endswith("_by_epoch") and metric.removesuffix("_by_epoch") in metrics)
    ]
    return "\n\n".join([title, *blocks])


def _block(metric: str, methods: Mapping[str, MethodResult]) -> str:
    """A title line and the aligned rows of one metric."""
    means = {name: _last(method.metrics[metric]) for name, method in methods.items()}
    differences = {
        name: (_last(method.paired_difference[metric].summary), method.paired_difference[metric].to)
        for name, method in methods.items()
        if metric in method.paired_difference
    }
    mean_digits = _decimals(means.values())
    difference_digits = _decimals(triple for triple, _ in differences.values())
    rows = []
    for name, method in methods.items():
        row = [name, *_cells(means[name], mean_digits), "", "", "", ""]
        if name in differences:
            triple, to = differences[name]
            star = "*" if triple[1] > 0 or triple[2] < 0 else ""
            row[3:] = [*_cells(triple, difference_digits, sign="+"), star, to]
        costs = (method.gradient_evaluations, method.second_order_products)
        rows.append([*row, *(f"{cost:,.10g}" for cost in costs)])
    name = printable(metric.replace("_by_epoch", ", last epoch"))
    header = [*(_HEADER if differences else _HEADER[:3] + ("",) * 4), *_COSTS]
    return "\n".join([f"{name} ({_better(metric)})", *_align([header, *rows])])


def _better(metric: str) -> str:
    if "norm_ratio" in metric:
        return "1 is best"
    return f"{'higher' if 'accuracy' in metric or 'cosine' in metric else 'lower'} is better"


def _last(summary: Summary) -> tuple[float, float, float]:
    """Mean and interval, of a curve at its end."""
    mean, low, high = (np.atleast_1d(x)[-1] for x in (summary.mean, *summary.ci95))
    return float(mean), float(low), float(high)


def _decimals(triples: Iterable[tuple[float, float, float]]) -> int:
    """Enough to show two digits of a typical interval's half width."""
    halves = np.array([(high - low) / 2 for _, low, high in triples])
    halves = halves[np.isfinite(halves) & (halves > 0)]
    if not halves.size:
        return 4
    return int(np.clip(1 - np.floor(np.log10(np.median(halves))), 0, 9))


def _cells(triple: tuple[float, float, float], decimals: int, sign: str = "") -> list[str]:
    """The mean, and the interval, which is empty for a single seed."""
    kinds = [f"{sign}.3e" if abs(x) >= 1e7 else f"{sign}.{decimals}f" for x in triple]
    mean, low, high = (
        "nan" if np.isnan(x) else format(x, kind) for x, kind in zip(triple, kinds, strict=True)
    )
    return [mean, "" if low == high == "nan" else f"[{low}, {high}]"]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, two spaces apart; columns without any content disappear."""
    lines = [""] * len(rows)
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        if not width:
            continue
        left = column[0] in _LEFT
        for i, cell in enumerate(column):
            lines[i] += (cell.ljust(width) if left else cell.rjust(width)) + "  "
    return [line.rstrip() for line in lines]
