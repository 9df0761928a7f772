"""The pages for people from other libraries: both programs of a page print the same, and, where an
environment with the other library is at hand, its blocks print what the page says."""

import importlib.util
import os
import subprocess

import pytest
from test_documents import ROOT, python_blocks, same_output

PAGES = {"jaxopt": "jaxopt", "torchopt": "torch", "betty": "betty", "gradhpo_0_1_3": "gradhpo"}
"""The environment of `benchmarks/peers.py` for each page; the one on Optax alone needs none."""
HOW = {page: f"python benchmarks/peers.py --install {name}" for page, name in PAGES.items()}
HOW["betty"] = "GRADHPO_PEER_BETTY=folder of one with Python 3.10, torch and betty-ml==0.2.1"
MARK = "-- the next block --"


def blocks(page, skipped):
    text = (ROOT / f"docs/migration/{page}.md").read_text("utf-8")
    return python_blocks(text, skipped)


@pytest.mark.parametrize("page", [*PAGES, "optax"])
def test_both_print_the_same(page):
    theirs, ours = (blocks(page, skipped)[0].printed for skipped in (page in PAGES, False))
    if page == "optax":  # by hand, then by the library
        theirs, ours = (block.printed for block in blocks(page, False)[:2])
    assert theirs and ours and same_output(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_their_blocks_print_what_the_page_says(page, tmp_path):
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks/peers.py")
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    python, found = peers.interpreter(PAGES[page]), blocks(page, True)
    if not python.exists():
        pytest.skip(f"no environment with it: {HOW[page]}")
    # Two packages of one name cannot be there at once.
    beside = {} if page == "gradhpo_0_1_3" else {"PYTHONPATH": str(ROOT / "src")}
    inherited = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "theirs.py").write_text(f"\nprint({MARK!r})\n".join(b.code for b in found))
    printed = subprocess.run(
        [python, "-W", "ignore", tmp_path / "theirs.py"],
        env={**inherited, **beside},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split(MARK)
    for block, got in zip(found, printed, strict=True):
        assert same_output(block.printed, got), f"says\n{block.printed}but prints\n{got}"
