"""A fresh cache for every test, and containers to write small data sets in."""

import pytest
from dataset_files import CONTAINERS


@pytest.fixture(autouse=True)
def _no_data_folder(request, monkeypatch, tmp_path):
    """Only tests of the real data see GRADHPO_DATA; nobody sees the real cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "real_data" not in request.node.nodeid:
        monkeypatch.delenv("GRADHPO_DATA", raising=False)


@pytest.fixture(params=CONTAINERS.values(), ids=CONTAINERS.keys())
def write_container(request):
    """`write(folder, {path: bytes})` as a folder tree or as an archive."""
    return request.param
