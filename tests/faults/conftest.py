"""The small problem and the methods on it are those of the tests of the classes; two checkpoints
are made once, and every test works on a copy of them."""

import sys
from pathlib import Path

import pytest
from checkpoint_cases import copied, saved

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))


@pytest.fixture(scope="session")
def two_checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoints") / "run", 20, 40)


@pytest.fixture
def run(two_checkpoints, tmp_path):
    """A directory with checkpoints of steps 20 and 40."""
    return copied(two_checkpoints, tmp_path / "run")
