"""The built pages in a real browser: formulas, tables, the first page, a phone, the dark."""

import subprocess
import sys
from pathlib import Path

import pytest
from browser import find, look

ROOT = Path(__file__).parents[1]
SEE = """
const content = document.querySelector("article") || document.body
return {
    beyond: document.documentElement.scrollWidth - window.innerWidth,
    formulas: document.querySelectorAll("mjx-container").length,
    raw: (content.innerText.match(/\\\\\\\\(frac|sum|lambda|alpha)/g) || []).length,
    cut: [...document.querySelectorAll(".table-wrapper")].map(x => x.scrollWidth - x.clientWidth),
    code: document.querySelectorAll("article .highlight-python").length,
    image: [...document.querySelectorAll("article img")].filter(x => x.naturalWidth > 100).length,
    paper: window.getComputedStyle(document.body).backgroundColor,
    text: content.innerText,
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The directory of the HTML, built without a network."""
    pytest.importorskip("sphinx")
    find()  # or nothing need be built
    out = tmp_path_factory.mktemp("html")
    build = [sys.executable, "-m", "sphinx", "-q", "-E", ROOT / "docs", out]
    subprocess.run(build, check=True)
    return out


def test_formulas_are_set_without_a_network(pages, tmp_path):
    seen = look(pages / "methods/greedy.html", SEE, tmp_path)
    assert seen["formulas"] > 10 and not seen["raw"]


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("page", ["choosing", "methods/index", "own_task", "api/tuning"])
def test_nothing_is_cut_off(pages, tmp_path, page, width):
    """At 1300 pixels every table fits, with its last column, the one with the answer."""
    seen = look(pages / f"{page}.html", SEE, tmp_path, width)
    assert seen["beyond"] <= 0
    if width == 1300:
        assert all(cut <= 1 for cut in seen["cut"])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_first_page_shows_what_the_library_does(pages, tmp_path, dark):
    seen = look(pages / "index.html", SEE, tmp_path, dark=dark)
    assert seen["code"] >= 1 and seen["image"] >= 1 and "tuned" in seen["text"]
    assert "a page per method" in seen["text"]
    assert (seen["paper"] == "rgb(255, 255, 255)") == (not dark)
