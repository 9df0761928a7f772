"""Two checkpoints, made once; every test works on a copy of them."""

import pytest
from checkpoint_cases import copied, saved


@pytest.fixture(scope="session")
def two_checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoints") / "run", 20, 40)


@pytest.fixture
def run(two_checkpoints, tmp_path):
    """A directory with checkpoints of steps 20 and 40."""
    return copied(two_checkpoints, tmp_path / "run")
