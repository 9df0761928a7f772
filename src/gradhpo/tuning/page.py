"""`report.html`: all of a run on one page that needs no other file and no network."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradhpo.report import StudyResult, Summary
from gradhpo.report.drawing import COLORS, FAINT, INK
from gradhpo.utils.logging import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #b8b8b8; --grid: #ebebeb; --paper: #fff;
        --line: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #777; --grid: #333; --paper: #16181c;
          --line: #5fb4e5; } }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; overflow-wrap: break-word; }
@media (max-width: 34rem) { table { font-size: .8rem; } th, td { padding-right: .4rem; } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
"""


def page(
    result: StudyResult,
    found: Mapping[str, Any],
    figures: Mapping[str, Callable[[], "Figure"]],
) -> str:
    """The page as text; whatever a user has named is escaped.

    Args:
        result: Of the run.
        found: The content of `hyperparams.json`.
        figures: Functions that draw, by name; drawn as SVG in the colours of the page.
    """
    parts = [
        f"<h1>{_text(result.study)}, tuned by {_text(found['method'])}</h1>",
        f"<pre>{_text(result.command)}</pre>",
        "<h2>At the end of training</h2>",
        *_at_the_end(result),
        "<h2>Hyperparameters</h2>",
        *_hyperparams(found),
        "<h2>From episode to episode</h2>",
        *(f"<figure>{_svg(name, make())}</figure>" for name, make in figures.items()),
        "<h2>Settings and versions</h2>",
        _table(["", ""], [*_settings(result), *result.versions.items()]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>gradhpo: {_text(result.study)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _at_the_end(result: StudyResult) -> list[str]:
    """A table of the metrics with one value per seed, a column for each training."""
    methods = result.methods
    metrics = dict.fromkeys(
        name
        for method in methods.values()
        for name in method.metrics
        if not name.endswith("_by_epoch")
    )
    rows = [[name, *(_cell(m.metrics.get(name)) for m in methods.values())] for name in metrics]
    for name in metrics:
        pairs = [method.paired_difference.get(name) for method in methods.values()]
        if to := next((pair.to for pair in pairs if pair), None):
            cells = [_cell(pair.summary, "+") if pair else "" for pair in pairs]
            rows.append([f"{name} − {to}", *cells])
    rows.append(["gradients", *(f"{m.gradient_evaluations:,.0f}" for m in methods.values())])
    rows.append(
        ["2nd-order products", *(f"{m.second_order_products:,.0f}" for m in methods.values())]
    )
    seeds = len(next(iter(methods.values())).metrics["val_loss"].seeds)
    of = f"Means over {seeds} seeds with 95 % intervals; differences are paired by seed. "
    return [
        _table(["", *methods], rows),
        f"<p>{of if seeds > 1 else ''}What is tuned by the validation data is judged by them too "
        "kindly: compare on test data.</p>",
    ]


def _hyperparams(found: Mapping[str, Any]) -> list[str]:
    seeds = found["seeds"]
    names = next(iter(seeds.values()))["from"]
    head = ["", *(f"seed {i}" for i in seeds)]
    rows = [
        [
            name,
            *(f"{_number(s['from'][name])} → {_number(s['to'][name])}" for s in seeds.values()),
        ]
        for name in names
    ]
    rows.append(["episodes", *(str(seed["episodes"]) for seed in seeds.values())])
    rows.append(["ended", *(seed["ended"] for seed in seeds.values())])
    rows.append(["status", *(_counts(seed["status"]) for seed in seeds.values())])
    best = f"Lowest validation loss: seed {found['best_seed']}." if len(seeds) > 1 else ""
    kept = "All values are in <code>hyperparams.json</code>."
    return [_table(head, rows), f"<p>{best} {kept}</p>"]


def _counts(status: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in status.items())


def _settings(result: StudyResult) -> list[tuple[str, Any]]:
    return list(result.to_json()["settings"].items())


def _cell(summary: Summary | None, sign: str = "") -> str:
    """A mean, and half of the width of its interval."""
    if summary is None:
        return ""
    half = float(summary.ci95[1] - summary.mean)
    digits = 4 if not half > 0 else int(np.clip(1 - np.floor(np.log10(half)), 0, 9))
    mean = format(float(summary.mean), f"{sign}.{digits}f")
    return mean if np.isnan(half) else f"{mean} ± {half:.{digits}f}"


def _number(value: float | None) -> str:
    return "nan" if value is None else format(value, ".4g")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = [line("th", head)] if any(head) else []
    lines = [*top, *(line("td", row) for row in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))


def _svg(name: str, figure: "Figure") -> str:
    """The figure as SVG without a background, its ink and its grid those of the page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_names = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_names)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Two figures on a page must not share the names of their clip paths.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, of_page in (
        (INK, "--ink"),
        (FAINT, "--faint"),
        ("#EBEBEB", "--grid"),
        (COLORS[0], "--line"),
    ):
        text = re.sub(color, f"var({of_page})", text, flags=re.IGNORECASE)
    return text
