"""What the documents show works: code blocks of README and docs, doctests of the package."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.stem != "__main__"
)
BLOCK = re.compile(
    r"(?P<skip><!-- no-run -->[ \t]*\n)?^```python[^\n]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
EXTRAS = set("PIL equinox flax matplotlib orbax pooch scipy sklearn tensorboardX tqdm tyro".split())


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks that are to run, each with the number of lines before it."""
    found = [m for m in BLOCK.finditer(text) if not m["skip"]]
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in found]


def documents_with_code() -> list[Path]:
    return [path for path in DOCUMENTS if python_blocks(path.read_text("utf-8"))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files that an example writes land in a temporary folder; figures open no window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.parametrize("path", documents_with_code(), ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run_in_order(path):
    namespace = {"__name__": "__main__"}
    for lines_before, code in python_blocks(path.read_text("utf-8")):
        # The empty lines make a traceback point at the right line of the document.
        exec(compile("\n" * lines_before + code, str(path), "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"needs the optional package {error.name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "see the captured output for the failing example"


def test_the_block_finder_sees_what_it_should():
    text = (
        "a\n```python\nx = 1\n```\n<!-- no-run -->\n```python\nbad(\n```\n```bash\nls\n```\n"
        "```python title\ny = x\n```\n"
    )
    assert python_blocks(text) == [(2, "x = 1\n"), (12, "y = x\n")]
