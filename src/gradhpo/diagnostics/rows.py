"""What a check finds: a row per method, and the table of all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradhpo.core.status import Status
from gradhpo.core.types import Hyper
from gradhpo.diagnostics.drawing import draw_rows, plot_check
from gradhpo.diagnostics.momentum import MOST
from gradhpo.utils._norms import floats, norm
from gradhpo.utils.validation import leaves_with_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HypergradientCheck", "Row", "compare"]

_HEADER = [
    *("method", "cosine", "norm ratio", "error", "worst leaf", "off by"),
    *("gradients", "products", "flops", "temp bytes"),
]


@dataclass(frozen=True)
class Row:
    """One method against the truth.

    Attributes:
        cosine: Of the angle between the two; NaN where one of them is zero.
        norm_ratio: Norm of the estimate over that of the truth.
        relative_error: Norm of the difference over that of the truth.
        worst_leaf: The leaf that is furthest off, and
        worst_error: by how much, relative to its own norm, or to a hundredth of the whole
            tree's where that is larger.
        gradients: Gradients of a loss, training and validation alike; None where not known.
        products: Second-order products.
        flops: Arithmetic of the method's program, in units of training alone over the window.
        temp_bytes: What the compiled program allocates beside its inputs and outputs; None where it
            is not one program: steps that convolve are taken one by one on CPU.
        status: Of the last estimate, a code of `gradhpo.Status`.
        info: Metrics of the last estimate.
        hypergrad: The estimate, shaped like the hyperparameters.
        refused: Why the method does not apply; all else is then NaN or None.
    """

    cosine: float = math.nan
    norm_ratio: float = math.nan
    relative_error: float = math.nan
    worst_leaf: str = ""
    worst_error: float = math.nan
    gradients: float | None = None
    products: float | None = None
    flops: float = math.nan
    temp_bytes: int | None = None
    status: Status = Status.OK
    info: Mapping[str, float] = field(default_factory=dict)
    hypergrad: Hyper = None
    refused: str = ""


@dataclass(frozen=True)
class HypergradientCheck:
    """Every method against the truth; `print` it, or look at `rows`.

    Attributes:
        rows: Results by method.
        truth: "reverse", "forward" or "differences".
        hypergrad: The exact hypergradient, in float64.
        val_loss: The validation loss after the window.
        steps: T.
        at_once: Share of what a gradient does to the weights in the end that its own step does;
            `1 - mu` for SGD with momentum mu. NaN where the inner optimizer is not known.
    """

    rows: Mapping[str, Row]
    truth: str
    hypergrad: Hyper
    val_loss: float
    steps: int
    at_once: float = math.nan

    def __str__(self) -> str:
        size = norm(floats(self.hypergrad))
        title = (
            f"hypergradient of {self.steps} steps by {self.truth}, float64: norm {size:.4g}, "
            f"validation loss {self.val_loss:.4g}"
        )
        lines, notes = [_HEADER], {}
        for name, row in self.rows.items():
            if not row.refused:
                lines.append(_cells(name, row))
            if row.refused or row.status != Status.OK:
                note = f"refused: {row.refused}" if row.refused else f"status {row.status.name}"
                notes.setdefault(note, []).append(name)
        said = [f"{', '.join(names)} {note}" for note, names in notes.items()]
        if self.at_once < MOST:
            said.append(
                f"momentum: the inner optimizer does {self.at_once:.0%} of what a gradient does to "
                "the weights at once and the rest later, which methods that look ahead one step at "
                "a time do not see. Give them virtual= (gradhpo.virtual_step), such as "
                "optax.sgd(rate / (1 - momentum))."
            )
        return "\n".join([title, "", *_align(lines), *([""] if said else []), *said])

    def plot(self, path: str | Path) -> Path:
        """Draw cosine and cost of every method into a file; the suffix of `path` is the format.

        Raises:
            ImportError: Matplotlib is missing.
        """
        return plot_check(self, path)

    def draw(self, axes: "Axes") -> None:
        """The same on Matplotlib axes, the first method on top, at the height 0, the next at 1."""
        draw_rows(self.rows, axes)


def compare(got: Hyper, want: Hyper) -> dict[str, Any]:
    """The fields of a `Row` that compare an estimate with the truth; none if it is not finite."""
    a, b = floats(got), floats(want)
    size, whole = norm(a), norm(b)
    if not np.isfinite(size):
        return {}
    dot = sum(float(np.sum(x * y)) for x, y in zip(a, b, strict=True))
    off = [norm([x - y]) for x, y in zip(a, b, strict=True)]
    own = [max(norm([y]), 1e-2 * whole) for y in b]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.divide(off, own)
        worst = int(np.argmax(errors))
        return {
            "cosine": float(np.divide(dot, size * whole)),
            "norm_ratio": float(np.divide(size, whole)),
            "relative_error": float(np.divide(norm([np.array(off)]), whole)),
            "worst_leaf": leaves_with_names(want)[worst][0],
            "worst_error": float(errors[worst]),
        }


def _cells(name: str, row: Row) -> list[str]:
    def whole(x):
        return "" if x is None else f"{x:,.10g}"

    return [
        *(name, f"{row.cosine:.4f}", f"{row.norm_ratio:.3g}", f"{row.relative_error:.1e}"),
        *(row.worst_leaf, f"{row.worst_error:.1e}", whole(row.gradients), whole(row.products)),
        *(f"{row.flops:.3g}", whole(row.temp_bytes)),
    ]


def _align(rows: list[list[str]]) -> list[str]:
    """Columns of one width; words on the left, numbers on the right."""
    words = [_HEADER.index("method"), _HEADER.index("worst leaf")]
    lines = [""] * len(rows)
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        for j, cell in enumerate(column):
            lines[j] += (cell.ljust(width) if i in words else cell.rjust(width)) + "  "
    return [line.rstrip() for line in lines]
