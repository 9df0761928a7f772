"""The numbers of one study as immutable objects, and their JSON form."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gradhpo.report.intervals import Summary, interval, paired
from gradhpo.report.provenance import command, versions
from gradhpo.utils._file_names import check_file_name

__all__ = ["METRICS", "Difference", "MethodResult", "StudyResult", "plain", "summarize"]

_LOSSES = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_mse")
_AGREEMENT = ("cosine", "norm_ratio", "relative_error")  # of an estimate with the exact derivative
_PRICES = ("update_flops", "flops", "seconds", "temp_bytes")  # of programs
_SCALARS = (*_LOSSES, *_AGREEMENT, *_PRICES)
METRICS = (*_SCALARS, *(f"{name}_by_epoch" for name in _SCALARS))
"""The names of metrics, and beside them `val_...` and `test_...`, which the losses of a user's own
task return; `_by_epoch` marks a curve, an array (seeds, epochs)."""
_OF_A_TASK = ("val_", "test_")


@dataclass(frozen=True)
class Difference:
    """How much a metric exceeds that of the method `to`, seed by seed."""

    to: str
    summary: Summary

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Difference":
        """Inverse of the JSON form `{"to", "mean", "ci95", "seeds"}`."""
        rest = {key: value for key, value in data.items() if key != "to"}
        return cls(str(data["to"]), Summary.from_json(rest))


@dataclass(frozen=True)
class MethodResult:
    """What one method reached and what it cost.

    Attributes:
        metrics: Summaries by name, each name one of `METRICS`.
        gradient_evaluations: Gradients of a loss taken by one seed's whole run.
        second_order_products: Hessian- or Jacobian-vector products of one seed's whole run.
        paired_difference: Differences to a baseline, by metric.

    Raises:
        ValueError: unknown metric, or a summary of the wrong shape for its name.
    """

    metrics: Mapping[str, Summary]
    gradient_evaluations: float = 0
    second_order_products: float = 0
    paired_difference: Mapping[str, Difference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        differences = {name: item.summary for name, item in self.paired_difference.items()}
        for metric, summary in [*self.metrics.items(), *differences.items()]:
            if metric not in METRICS and not metric.startswith(_OF_A_TASK):
                raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
            if (summary.seeds.ndim == 2) != metric.endswith("_by_epoch"):
                raise ValueError(
                    f"metric {metric!r} has values of shape {summary.seeds.shape}; a curve "
                    "(seeds, epochs) has a name in _by_epoch, one value per seed has not."
                )

    def to_json(self) -> dict[str, Any]:
        """This method's entry under `methods` in `result.json`."""
        return {
            "metrics": {name: summary.to_json() for name, summary in self.metrics.items()},
            "gradient_evaluations": self.gradient_evaluations,
            "second_order_products": self.second_order_products,
            "paired_difference": {
                name: {"to": item.to, **item.summary.to_json()}
                for name, item in self.paired_difference.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MethodResult":
        """Inverse of `to_json`; errors name the key they concern."""
        gradients, products = data["gradient_evaluations"], data["second_order_products"]
        if not (isinstance(gradients, int | float) and isinstance(products, int | float)):
            raise ValueError(f"costs must be numbers, not {gradients!r} and {products!r}")
        for cost in (gradients, products):
            float(cost)  # JSON has whole numbers beyond every float
        metrics = _each(Summary.from_json, data["metrics"], "metrics")
        differences = _each(Difference.from_json, data["paired_difference"], "paired_difference")
        return cls(metrics, gradients, products, differences)


@dataclass(frozen=True)
class StudyResult:
    """Everything a study found, with what is needed to find it again.

    Attributes:
        study: Name of the study.
        settings: Its `Config`, or a mapping; values become JSON (a path becomes text).
        methods: Results by method name.
        wall_seconds: Time of the whole study.
        data: SHA-256 of each data file read, by file name.
        files: What is written beside `result.json` and `curves.csv`, by file name: a function that
            writes it to a path. Tables come before figures. Not part of the JSON form.
        versions: See `versions()`, the default.
        command: See `command()`, the default.

    Raises:
        ValueError: a name cannot be printed on a line, or not be that of a file in the directory of
            the results; or a difference is to an absent method.

    >>> losses = {"fixed": {"val_loss": [2.0, 3.0]}, "t1t2": {"val_loss": [1.5, 2.6]}}
    >>> result = StudyResult("toy", {}, summarize(losses, baseline="fixed"), wall_seconds=1.0)
    >>> result.to_json()["methods"]["fixed"]["metrics"]["val_loss"]["mean"]
    2.5
    """

    study: str
    settings: Any
    methods: Mapping[str, MethodResult]
    wall_seconds: float
    data: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Callable[[Path], object]] = field(
        default_factory=dict, repr=False, compare=False
    )
    versions: Mapping[str, Any] = field(default_factory=versions)
    command: str = field(default_factory=command)

    def __post_init__(self) -> None:
        for name in (self.study, *self.methods):
            if not name or not name.isprintable():
                raise ValueError(f"a name must be printable and not empty, not {name!r}.")
        for name in self.files:
            check_file_name(name)
        for name, method in self.methods.items():
            for item in method.paired_difference.values():
                if item.to not in self.methods:
                    raise ValueError(f"{name!r} is compared with {item.to!r}, which is absent.")

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`: plain, strict JSON values."""
        return {
            "study": self.study,
            "settings": plain(self.settings),
            "versions": dict(self.versions),
            "command": self.command,
            "wall_seconds": self.wall_seconds,
            "data": dict(self.data),
            "methods": {name: method.to_json() for name, method in self.methods.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StudyResult":
        """Inverse of `to_json`; `settings` stays a mapping.

        Raises:
            ValueError: the content does not have the form of `to_json`; names the key.
        """
        types = {"study": str, "command": str, "wall_seconds": int | float}
        types |= dict.fromkeys(("settings", "methods", "data", "versions"), Mapping)
        if set(data) != set(types):
            wrong = sorted(set(data) ^ set(types))
            raise ValueError(f"missing or unknown keys: {', '.join(map(repr, wrong))}")
        for key, kind in types.items():
            if not isinstance(data[key], kind):
                raise ValueError(f"{key}: a {type(data[key]).__name__} is of the wrong type")
        methods = _each(MethodResult.from_json, data["methods"], "methods")
        return cls(**{**data, "methods": methods})


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


def _each(parse: Callable[[Any], Any], items: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Parse every value of a mapping; an error gets the path of the key in front."""
    parsed = {}
    for name, item in items.items():
        try:
            parsed[name] = parse(item)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{where}.{name}: {error}") from None
    return parsed


def plain(value: Any) -> Any:
    """Settings as JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PathLike):
        return str(value)
    raise TypeError(f"settings cannot hold a {type(value).__name__}: {value!r}.")
