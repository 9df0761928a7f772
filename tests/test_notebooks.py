"""The notebooks in code/ run, and show what is stored in them, which names no machine.

To store the outputs again, with the extra `notebook`:

    jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False \
        --ClearMetadataPreprocessor.enabled=True code/demo_*.ipynb
"""

import base64
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("code/*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return pytest.importorskip("nbformat").read(request.param, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell):
    shown = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return [data["image/png"] for data in shown]


def test_a_fresh_run_shows_what_is_stored(notebook):
    """Numbers to 5 per cent, for compilers round differently; of pictures, that there is one."""
    nbclient = pytest.importorskip("nbclient")
    fresh = deepcopy(notebook)
    for cell in code(fresh):
        cell.outputs = []
    nbclient.NotebookClient(fresh, resources={"metadata": {"path": str(ROOT / "code")}}).execute()
    for stored, found in zip(code(notebook), code(fresh), strict=True):
        assert stored.execution_count == found.execution_count
        said, got = text_of(stored), text_of(found)
        assert NUMBER.sub("", said) == NUMBER.sub("", got)
        numbers = [list(map(float, NUMBER.findall(text))) for text in (said, got)]
        np.testing.assert_allclose(*numbers, rtol=0.05, atol=1e-3)
        assert len(pictures_of(stored)) == len(pictures_of(found))


def test_what_is_stored_is_small_and_names_no_machine(notebook):
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert any(pictures_of(cell) for cell in code(notebook))
    for cell in code(notebook):
        assert not cell.metadata
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"/(home|root|tmp|usr|Users)/", text_of(cell))
        assert all(len(base64.b64decode(each)) < 60_000 for each in pictures_of(cell))


def test_the_sections_of_the_tutorial():
    text = (ROOT / "code" / "demo_methods.ipynb").read_text()
    assert re.findall(r'"## \d\. (.+?)(?:\\n)?"', text) == [
        *("HyperDistill", "One step", "First order", "T1–T2", "Greedy", "All of them")
    ]
