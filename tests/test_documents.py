"""What the documents show is true: code blocks of README and docs run and print what stands below
them, and the doctests of the package pass."""

import contextlib
import doctest
import importlib
import io
import itertools
import re
import shlex
import sys
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.stem != "__main__"
)
# A block of Python, or of commands that are to run, and what it prints: the text block that follows
# with nothing in between.
BLOCK = re.compile(
    r"(?P<skip><!-- no-run -->[ \t]*\n)?^(?:```python|<!-- run -->[ \t]*\n(?P<shell>```bash))"
    r"[^\n]*\n(?P<code>.*?)^```[ \t]*\n"
    r"(?:\n*(?P<varies><!-- varies[^\n]*-->[ \t]*\n)?^```text\n(?P<printed>.*?)^```[ \t]*$)?",
    re.MULTILINE | re.DOTALL,
)
# Not the digits in a name like float32; 2,000 is one number, 1, 2 are two.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?(?![\w])")
EXTRAS = set(
    "PIL equinox filelock flax matplotlib optuna orbax pooch scipy sklearn tensorboardX tqdm"
    " tyro".split()
)


class Block(NamedTuple):
    lines_before: int
    code: str
    printed: str | None  # what the document says that it prints
    varies: bool  # its numbers are those of one machine or version


def python_blocks(text: str, skipped: bool = False) -> list[Block]:
    """The ```python blocks, and the ```bash blocks that are to run, as Python; or those skipped."""
    return [
        Block(
            text.count("\n", 0, m.start("code")),
            commands(m["code"]) if m["shell"] else m["code"],
            m["printed"],
            bool(m["varies"]),
        )
        for m in BLOCK.finditer(text)
        if bool(m["skip"]) == skipped
    ]


def commands(block: str) -> str:
    """The lines that call `gradhpo`, in this process; others install something."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return "".join(
        f"from gradhpo import cli; assert cli.main({line[1:]}) == 0\n"
        if line[:1] == ["gradhpo"]
        else "\n"
        for line in lines
    )


def same_number(said: str, got: str) -> bool:
    """Equal up to one unit of the last digit that the document prints; integers are exact.

    Compilers round differently, and a number next to a tie is printed with either digit.
    """
    rounded = re.search(r"\.\d|e", said)
    want, found = (Decimal(x.replace(",", "")) for x in (said, got))
    unit = Decimal(1).scaleb(want.as_tuple().exponent) if rounded else 0
    return abs(want - found) <= unit


def same_output(said: str, got: str, varies: bool = False) -> bool:
    """Words as they are, white space aside (documents wrap long lines), numbers as above."""
    words = [" ".join(NUMBER.sub("#", x).split()) for x in (said, got)]
    pairs = zip(NUMBER.findall(said), NUMBER.findall(got), strict=False)
    return words[0] == words[1] and (varies or all(itertools.starmap(same_number, pairs)))


def documents_with_code() -> list:
    """Paths as parameters; one that shows figures of compiled programs has the users' compiler."""
    texts = {path: path.read_text("utf-8") for path in DOCUMENTS}
    return [
        pytest.param(
            path,
            id=str(path.relative_to(ROOT)),
            marks=[pytest.mark.optimised] if "memory_analysis" in text else [],
        )
        for path, text in texts.items()
        if python_blocks(text)
    ]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files that an example writes land in a temporary folder; figures open no window; one that
    fails leaves no other default of floats behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "path", list(sys.path))  # `gradhpo tune` looks in this folder
    before, modules = jax.config.read("jax_enable_x64"), set(sys.modules)
    yield
    jax.config.update("jax_enable_x64", before)
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("path", documents_with_code())
def test_blocks_run_in_order(path):
    namespace, wrong = {"__name__": "__main__"}, []
    for block in python_blocks(path.read_text("utf-8")):
        # The empty lines make a traceback point at the right line of the document.
        code = compile("\n" * block.lines_before + block.code, str(path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)
        got = out.getvalue()
        if block.printed is not None and not same_output(block.printed, got, block.varies):
            line = block.lines_before + block.code.count("\n") + 1
            wrong.append(f"{path.name}, below line {line}, says\n{block.printed}but prints\n{got}")
    assert not wrong, "\n".join(wrong)


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
        "```python title\ny = x\n```\n\n```text\n1.0\n```\n```python\nz\n```\nwords\n```text\nno\n"
        "```\n```python\nz\n```\n\n<!-- varies: seconds -->\n```text\n3 s\n```\n"
        "<!-- run -->\n```bash\npip install x\ngradhpo list 'a b'  # all\n```\n```text\nc\n```\n"
    )
    assert python_blocks(text) == [
        Block(2, "x = 1\n", None, False),
        Block(12, "y = x\n", "1.0\n", False),
        Block(19, "z\n", None, False),
        Block(26, "z\n", "3 s\n", True),
        Block(
            35, "\nfrom gradhpo import cli; assert cli.main(['list', 'a b']) == 0\n", "c\n", False
        ),
    ]


@pytest.mark.parametrize(
    "said, got, same",
    [
        ("loss 0.25\n", "loss  0.26\n", True),
        ("loss 0.25", "loss 0.27", False),
        ("loss 0.25", "gain 0.25", False),
        ("0.25", "-0.25", False),
        ("2.0e-06", "2.1e-06", True),
        ("4e+00", "5e+00", True),
        ("[0. 1.]", "[0. 2.]", False),
        ("2.0e-06", "2.0e-05", False),
        ("1,200 steps", "1,201 steps", False),
        ("(20, 64)", "(20, 65)", False),
        ("float32", "float64", False),
        ("[1.0 2.0]", "[1.0 2.0 3.0]", False),
        ("0.5", "nan", False),
        ("0.5", "", False),
    ],
)
def test_a_wrong_output_is_seen(said, got, same):
    assert same_output(said, got) == same


def test_where_numbers_vary_words_do_not():
    assert same_output("3.1 s", "4.2 s", varies=True)
    assert not same_output("3.1 s", "4.2 ms", varies=True)
