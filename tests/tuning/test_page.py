"""`report.html` in a real browser: at the width of a desk and of a phone, light and dark."""

import pytest
from browser import look

SEE = """
const one = (query) => document.querySelector(query)
const wide = [...document.querySelectorAll(".wide")]
return {
    beyond: document.documentElement.scrollWidth - window.innerWidth,
    paper: window.getComputedStyle(document.body).backgroundColor,
    ink: window.getComputedStyle(document.body).color,
    line: window.getComputedStyle(one("svg path[style*='--ink'], svg text")).fill,
    figures: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    tables: wide.map(table => table.textContent),
    cut: wide.map(table => table.scrollWidth - table.clientWidth),
}"""


@pytest.fixture
def page(gradhpo, here):
    arguments = ("--episodes", "4", "--steps", "5", "--out", "a", "--seeds", "2")
    assert gradhpo("tune", "small:strict", *arguments)[0] == 0
    return (here / "a/report.html").read_text("utf-8")


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_is_seen(page, tmp_path, width, dark):
    seen = look(page, SEE, tmp_path, width, dark)
    assert seen["beyond"] <= 0  # no sideways scrolling of the page
    assert len(seen["figures"]) == 3 and all(0 < x <= width for x in seen["figures"])
    assert seen["cut"][0] <= 0  # the table of results, with its last column
    assert "trained anew" in seen["tables"][0] and "rate" in seen["tables"][1]
    assert (seen["paper"], seen["ink"]) == (
        ("rgb(22, 24, 28)", "rgb(230, 230, 230)")
        if dark
        else ("rgb(255, 255, 255)", "rgb(34, 34, 34)")
    )
    assert seen["line"] == seen["ink"]  # letters in figures are readable too
