"""The list of deliberate faults fits the source; `make mutations` puts them in."""

import shutil

import mutations
import pytest


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=[f.name for f in mutations.FAULTS])
def test_a_fault_can_be_put_in(fault, tmp_path):
    path = tmp_path / mutations.SOURCE / fault.file
    path.parent.mkdir(parents=True)
    shutil.copy(mutations.ROOT / mutations.SOURCE / fault.file, path)
    before = path.read_text("utf-8")
    mutations.put(fault, tmp_path)
    compile(path.read_text("utf-8"), path, "exec")
    assert path.read_text("utf-8") != before
    for argument in fault.tests.split():
        file, _, _ = argument.partition("::")
        assert not file.startswith("tests/") or (mutations.ROOT / file).exists()
