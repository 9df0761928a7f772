"""The tables of the documents, of what the methods themselves say."""

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from gradhpo.algorithms.method import METHODS, Method
from gradhpo.core.estimator import Cost, Estimator

__all__ = ["cost_table", "summary_table"]

STEPS = 120
"""Inner steps of the runs that the costs are read off, a multiple of every window."""


class _Linear(NamedTuple):
    """What a run of T steps takes, as `per_step * T + once`."""

    per_step: Fraction
    once: Fraction

    def __str__(self) -> str:
        terms = [_times(self.per_step, "$T$"), _times(self.once)]
        return " + ".join(term for term in terms if term) or "–"


def _estimator(method: Method, steps: int) -> Estimator:
    needed = {name: method.example.settings[name] for name in method.needs}
    return method.estimator(steps, **needed)


def _costs(method: Method, size: int, *, fit: bool = True) -> tuple[_Linear, _Linear]:
    """Gradients and products of a run with `size` hyperparameters, a fit before it included."""

    def cost(steps: int) -> Cost:
        estimator = _estimator(method, steps)
        return (estimator if fit else estimator._replace(start_price=None)).cost(steps, size)

    def line(one: float, two: float) -> _Linear:
        slope = Fraction(two - one) / STEPS
        return _Linear(slope, Fraction(one) - STEPS * slope)

    one, two = cost(STEPS), cost(2 * STEPS)
    return line(one.gradients, two.gradients), line(one.products, two.products)


def _times(factor: Fraction, unit: str = "") -> str:
    """A product in words; nothing where it is zero."""
    number = f"{float(factor):g}" if factor.denominator in (1, 2, 4, 5, 10) else str(factor)
    if not factor:
        return ""
    return unit if unit and factor == 1 else f"{number} {unit}".strip()


def _per_step(method: Method) -> str:
    gradients, products = _costs(method, 1, fit=False)
    grows = _costs(method, 2, fit=False)[1] != products
    terms = [
        _times(gradients.per_step, "$G$"),
        _times(products.per_step, "$H M$" if grows else "$M$"),
    ]
    return " + ".join(term for term in terms if term)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _table(*rows: Iterable[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary_table(pages: str = "docs/methods") -> str:
    """What each method estimates, takes and is for, in Markdown: a row per page.

    Args:
        pages: The folder that the links lead to.

    >>> print(summary_table().splitlines()[2].partition(" | the direct")[0])
    | [first order](docs/methods/first_order.md) | `FOOptimizer`, `first_order`
    """
    shared: dict[str, list[Method]] = {}
    for method in METHODS.values():
        if method.summary is not None:
            shared.setdefault(method.summary.title, []).append(method)
    rows = []
    for methods in shared.values():
        row = methods[0].summary
        assert row is not None
        rows.append(
            (
                f"[{row.title}]({pages}/{row.page}.md)",
                _code(
                    [m.optimizer.__name__ for m in methods] + [m.factory.__name__ for m in methods]
                ),
                row.estimates,
                _per_step(methods[0]) + row.remark,
                row.memory,
                row.exact,
                row.use,
            )
        )
    head = (
        "method",
        "class, estimator",
        "estimates",
        "cost per inner step",
        "memory",
        "exact when",
        "use it for",
    )
    return _table(head, ("---",) * len(head), *rows)


def cost_table() -> str:
    """What one run of T inner steps takes by each method, in Markdown: a row per name.

    >>> print(*cost_table().splitlines()[2:4], sep="\\n")
    | `fo` | `FOOptimizer` | `first_order` | 1 | 2 $T$ | – |
    | `one_step` | `OneStepOptimizer` | `one_step` | 1 | 2 $T$ | $T$ |
    """
    head = ("name", "class", "estimator", "window", "gradients", "products")
    rows = []
    for name, method in METHODS.items():
        gradients, products = _costs(method, 1)
        grows = _costs(method, 2)[1] != products
        window = _estimator(method, STEPS).unroll_steps
        rows.append(
            (
                f"`{name}`",
                f"`{method.optimizer.__name__}`",
                f"`{method.factory.__name__}`",
                "$T$" if window == STEPS else str(window),
                str(gradients),
                str(products).replace("$T$", "$H T$") if grows else str(products),
            )
        )
    return _table(head, ("---",) * len(head), *rows)
