"""docs/reliability.md has a row for every fault, and its tests exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = range(1, 71)
LEAST = 66
"""So many have a test; the others have a reason."""


def rows():
    text = (ROOT / "docs/reliability.md").read_text("utf-8")
    table = text.partition("<!-- faults -->")[2].partition("<!-- end of faults -->")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            yield int(cells[0]), cells


def named(cells):
    return re.findall(r"`(tests/[\w/.]+)::(\w+)`", cells[-1])


def test_every_fault_has_one_row():
    assert [number for number, _ in rows()] == list(FAULTS)


def test_nearly_all_have_a_test():
    without = [number for number, cells in rows() if not named(cells)]
    assert len(FAULTS) - len(without) >= LEAST, without


@pytest.mark.parametrize("number, cells", list(rows()))
def test_the_tests_of_a_row_exist(number, cells):
    assert named(cells) or len(cells[-1]) > 30, "neither a test nor a reason"
    for path, test in named(cells):
        assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{path} has no {test}"
        assert path.startswith("tests/faults/") and re.search(rf"_{number:02d}(_|$)", test)


def test_every_test_of_a_fault_is_in_the_table():
    listed = {test for _, cells in rows() for _, test in named(cells)}
    numbers = {int(n) for test in listed for n in re.findall(r"_(\d\d)(?=_)", test)}
    for path in sorted((ROOT / "tests/faults").glob("test_*.py")):
        for test in re.findall(r"^def (test_\d\d\w*)\(", path.read_text("utf-8"), re.MULTILINE):
            assert {int(n) for n in re.findall(r"_(\d\d)(?=_)", test)} <= numbers, test
