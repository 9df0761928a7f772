"""What a newcomer gets: the commands of the README in a fresh environment, outside the checkout."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # installs JAX and Flax


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT]
    subprocess.run(pip, check=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "gradhpo/py.typed" in names and "gradhpo/tuning/starters/flax_nnx.py" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"gradhpo"}


def test_four_commands_from_nothing_to_the_hypergradient_of_a_flax_model(wheel, tmp_path):
    """Install, write the file, tune; sixty lines, of which a user changes some."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    clean = {key: x for key, x in os.environ.items() if not key.startswith(("PYTHON", "GRADHPO"))}
    env = {**clean, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(programs / "pip", "install", "--quiet", f"{wheel}[cli,data,plot,flax]")
    run(programs / "gradhpo", "init", "--flax", "nnx")
    lines = [line for line in (tmp_path / "my_task.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 60
    out = run(programs / "gradhpo", "tune", "my_task:task", "--episodes", "3", "--out", "a")
    assert "test_accuracy (higher is better)" in out
    logged = (tmp_path / "a/seed0.jsonl").read_text()
    norms = [float(x) for x in re.findall(r'"hypergrad_norm": ([-+.\de]+)', logged)]
    assert len(norms) == 3 and min(norms) > 0
