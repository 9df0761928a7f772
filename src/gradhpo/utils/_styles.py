"""The look of every figure: ink, colours, and for each method a colour, a dash and a marker."""

import colorsys
import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["COLORS", "FAINT", "INK", "STYLES", "Style", "styles"]

INK, FAINT = "#333333", "#B8B8B8"

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


class Style(NamedTuple):
    """How Matplotlib draws a method."""

    color: str
    dash: str
    marker: str


# A hue for each kind of method. What a colour-blind reader, or a grey print, sees as one colour
# differs in marker, and in a kind in dash or lightness.
STYLES: dict[str, Style] = {
    # nothing is tuned
    "fixed": Style(INK, "-", "."),
    # the last steps: vermilion to brown
    "fo": Style("#8C5A2B", ":", "v"),
    "one_step": Style("#D55E00", "-", "s"),
    "t1t2": Style("#F39C5A", "--", "D"),
    "greedy": Style("#99000D", "-.", "^"),
    # the episode, with something in place of its derivatives: green
    "hyperdistill": Style("#009E73", "-", "p"),
    "drmad": Style("#00664B", "--", "P"),
    "discounted_sum": Style("#5AA02C", "-.", "h"),
    # the window, exactly: blue
    "reverse": Style("#0072B2", "-", "o"),
    "reversible": Style("#56B4E9", "--", "<"),
    "forward": Style("#2A4E9B", "-.", ">"),
    "rtho": Style("#7C9BD6", ":", "X"),
    "fds": Style("#123A66", "--", "d"),
    # the derivative of the minimum: purple
    "implicit_cg": Style("#CC79A7", "-", "v"),
    "implicit_neumann": Style("#8E3B77", "--", "s"),
    "implicit_nystrom": Style("#B05CC4", "-.", "D"),
    "implicit_identity": Style("#5B2A6E", ":", "^"),
    # the same in a single loop: orange to olive
    "soba": Style("#E69F00", "-", "o"),
    "saba": Style("#A87400", "--", "P"),
    "amigo": Style("#C4B000", "-.", "X"),
    "stocbio": Style("#7A6A00", ":", "*"),
    "f2sa": Style("#5C4A1E", "--", "h"),
    # a smoothed loss: violet
    "es": Style("#6A51A3", "-", "*"),
    "pes": Style("#9E8FD0", "--", "H"),
    # searches over whole trainings: grey
    "random": Style("#777777", "--", "x"),
    "tpe": Style("#444444", "-.", "+"),
    "cmaes": Style("#9A9A9A", ":", "1"),
    # rules without a hypergradient, and what moves their rates
    "sgd": Style("#0072B2", ":", "^"),
    "sgd_hd": Style("#0072B2", "-", "^"),
    "sgdn": Style("#009E73", ":", "s"),
    "sgdn_hd": Style("#009E73", "-", "s"),
    "adam": Style("#D55E00", ":", "D"),
    "adam_hd": Style("#D55E00", "-", "D"),
}

# The methods under the names of papers, tutorials and single studies.
ALIASES = {
    **dict.fromkeys(("none", "initial", "untouched", "untuned", "Fixed"), "fixed"),
    **dict.fromkeys(("full", "maml"), "reverse"),
    **dict.fromkeys(("IFT", "N.IFT"), "implicit_neumann"),
    **{"FO": "fo", "One-step": "one_step", "T1T2": "t1t2", "T1-T2": "t1t2", "Greedy": "greedy"},
    **{"HyperDistill": "hyperdistill", "implicit": "implicit_cg"},
}
LIGHTER = (0.0, 0.7, -0.4, 0.4, -0.7)  # variants of one method: towards pale, towards black
PALE = 0.75  # the lightness that still stands out from white
OTHERS = tuple(  # seven colours; all 28 differ in colour or dash, and neighbours in both
    Style(COLORS[i % 7], DASHES[i % 4], "osD^v<>"[(i + i // 7) % 7]) for i in range(28)
)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The look of each name in a figure that shows them all.

    A name may carry settings, a place or a variant: "hyperdistill:gamma=0.9", "greedy 0.5, T=5",
    "sinusoid: drmad" and "one_step_virtual" look like their methods. Of several that share a
    method, all but the first differ from it in lightness and dash. Names of no known method get,
    in their order, colours that nothing else in the figure has while there are such.

    >>> styles(["greedy 0.9", "loss", "reverse"])["reverse"] == STYLES["reverse"]
    True
    >>> styles(["IFT(2)", "greedy"])["IFT(2)"].color == STYLES["implicit_neumann"].color
    True
    """
    methods = {name: _method(name) for name in names}
    seen: dict[str, int] = {}
    found = {}
    for name, method in methods.items():
        if method is not None:
            k = seen[method] = seen.get(method, -1) + 1
            found[name] = _variant(STYLES[method], k)
    taken = {style.color for style in found.values()}
    others = sorted(OTHERS, key=lambda other: other.color in taken)  # colours not in use first
    unknown = [name for name, method in methods.items() if method is None]
    found |= {name: others[i % len(others)] for i, name in enumerate(unknown)}
    return {name: found[name] for name in methods}


def _method(name: str) -> str | None:
    """The row of the table that a name belongs to."""
    word = re.split(r"[:,( ]", name.rpartition(": ")[2])[0]
    while word not in STYLES and word not in ALIASES and "_" in word:
        word = word.rpartition("_")[0]
    word = ALIASES.get(word, word)
    return word if word in STYLES else None


def _variant(style: Style, k: int) -> Style:
    """The k-th of those that share a method."""
    by = LIGHTER[k % len(LIGHTER)]
    rgb = (int(style.color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, light, full = colorsys.rgb_to_hls(*rgb)
    light += by * (max(PALE - light, 0) if by > 0 else light)
    rgb = colorsys.hls_to_rgb(hue, light, full * (0.6 if by > 0 else 1.0))  # pale, not neon
    dash = DASHES[(DASHES.index(style.dash) + k) % len(DASHES)]
    return Style("#" + "".join(f"{round(255 * x):02X}" for x in rgb), dash, style.marker)
