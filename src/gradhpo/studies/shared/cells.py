"""Results of a study that runs the same methods in several settings, its cells."""

from collections.abc import Mapping
from dataclasses import replace

from numpy.typing import ArrayLike

from gradhpo.report import Difference, MethodResult, interval, summarize

__all__ = ["ends", "summarize_cells"]


def summarize_cells(
    values: Mapping[str, Mapping[str, Mapping[str, ArrayLike]]],
    costs: Mapping[str, tuple[float, float]],
    baseline: str,
) -> dict[str, MethodResult]:
    """`gradhpo.report.summarize` of every cell, `values[cell][method][metric]`, in one mapping.

    A method is named with its cell in front of it, or alone where there is one cell. Differences
    are to the baseline of the same cell.

    >>> both = {"fixed": {"val_loss": [2.0, 3.0]}, "greedy": {"val_loss": [1.5, 2.5]}}
    >>> found = summarize_cells({"mnist": both, "digits": both}, {}, "fixed")
    >>> list(found)[1], found["digits greedy"].paired_difference["val_loss"].to
    ('mnist greedy', 'digits fixed')
    """
    summaries = {}
    for cell, each in values.items():
        prefix = f"{cell} " if len(values) > 1 else ""
        for method, result in summarize(each, dict(costs), baseline=baseline).items():
            to = {
                metric: Difference(prefix + baseline, difference.summary)
                for metric, difference in result.paired_difference.items()
            }
            summaries[prefix + method] = replace(result, paired_difference=to)
    return summaries


def ends(values: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds, and the lower and upper end of its 95 % interval.

    >>> [round(x, 3) for x in ends([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    summary = interval(values)
    return float(summary.mean), float(summary.ci95[0]), float(summary.ci95[1])
