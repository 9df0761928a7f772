"""What a newcomer gets: the commands of the README in a fresh environment, outside the checkout."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # installs JAX and Flax


class Built(NamedTuple):
    sdist: Path
    wheel: Path  # made of the sdist, not of the checkout


class Installed(NamedTuple):
    """An environment with the wheel, and a folder that is not the checkout."""

    programs: Path
    folder: Path

    def run(self, program, *arguments, status=0):
        clean = {k: x for k, x in os.environ.items() if not k.startswith(("PYTHON", "GRADHPO"))}
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.folder,
            env={**clean, "PATH": path, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    found = Installed(folder / "venv" / ("Scripts" if os.name == "nt" else "bin"), folder)
    found.run("pip", "install", "--quiet", f"{built.wheel}[cli,data,plot,flax]")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built.wheel).namelist()
    assert "gradhpo/py.typed" in names and "gradhpo/tuning/starters/flax_nnx.py" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"gradhpo"}


def test_the_sdist_has_what_tests_and_documents_need_and_no_data(built):
    with tarfile.open(built.sdist) as archive:
        files = {m.name.partition("/")[2]: m.size for m in archive.getmembers() if m.isfile()}
    needed = "src/gradhpo/py.typed tests/conftest.py docs/conf.py benchmarks/figures.json Makefile"
    assert {*needed.split(), "README.md", "LICENSE", "pyproject.toml"} <= set(files)
    assert not [name for name in files if name.startswith(("docs/api/", "docs/_build/", "out/"))]
    assert max(files.values()) < 1_000_000  # bytes; a data set is larger
    kinds = {Path(name).suffix for name in files} - {""}
    assert kinds <= set(
        ".cff .css .html .ipynb .json .md .png .py .toml .txt .typed .yml".split()
    ), kinds


def test_four_commands_from_nothing_to_the_hypergradient_of_a_flax_model(installed):
    """Install, write the file, tune; sixty lines, of which a user changes some."""
    installed.run("gradhpo", "init", "--flax", "nnx")
    text = (installed.folder / "my_task.py").read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 60
    out = installed.run("gradhpo", "tune", "my_task:task", "--episodes", "3", "--out", "a")
    assert "test_accuracy (higher is better)" in out
    logged = (installed.folder / "a/seed0.jsonl").read_text()
    norms = [float(x) for x in re.findall(r'"hypergrad_norm": ([-+.\de]+)', logged)]
    assert len(norms) == 3 and min(norms) > 0


def test_a_demonstration_needs_no_network_data(installed):
    assert "val_loss" in installed.run("gradhpo", "demo", "--fast", "--seeds", "1")


def test_types_reach_the_program_of_a_user(installed):
    """py.typed is honoured: what fits has no error, and each wrong argument is one."""
    fits = "import gradhpo as gh\ntuner = gh.GreedyOptimizer(unroll_steps=5, T=20)\n"
    wrong = 'gh.one_step(gamma="much")\ngh.reverse("ten")\ngh.one_step(0.5).estimate(1)\n'
    (installed.folder / "fits.py").write_text(fits)
    (installed.folder / "wrong.py").write_text(fits + wrong)

    def errors(name):
        python = installed.programs / "python"
        command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, name]
        done = subprocess.run(command, cwd=installed.folder, capture_output=True, text=True)
        return json.loads(done.stdout)["generalDiagnostics"]

    assert errors("fits.py") == []
    assert {each["range"]["start"]["line"] for each in errors("wrong.py")} == {2, 3, 4}
