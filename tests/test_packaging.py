"""What pyproject.toml promises of dependencies: bounds that are tested, extras that are used."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What the library imports: not what builds, tests or opens something (an editor for notebooks).
OTHERS = ("all", "docs", "notebook", "test")
USED = {name: each for name, each in EXTRAS.items() if name not in OTHERS}
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "orbax-checkpoint": "orbax",
}  # where it is not the name of the package
IMPORTED_BY_OTHERS = {"cmaes": "by Optuna, for `gradhpo compare --method cmaes`"}


def split(requirement: str) -> tuple[str, str]:
    """Name and lower bound."""
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    assert found, f"{requirement} has no lower bound, or more than one"
    return found[1], found[2]


def test_the_oldest_job_has_every_lower_bound():
    lines = (ROOT / "tests/oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [*PROJECT["dependencies"], *(each for extra in USED.values() for each in extra)]
    for name, bound in map(split, wanted):
        assert pinned[name] == bound
    assert pinned["jaxlib"] == pinned["jax"]
    assert "tests/oldest.txt" in (ROOT / ".github/workflows/tests.yml").read_text("utf-8")


@pytest.mark.parametrize("extra", USED)
def test_what_an_extra_installs_is_imported(extra):
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    for name, _ in map(split, USED[extra]):
        module = re.escape(MODULES.get(name, name))
        call = rf'^\s*(import|from) {module}\b|(require|import_module)\("{module}\b'
        assert name in IMPORTED_BY_OTHERS or re.search(call, source, re.MULTILINE), name


def test_all_is_every_extra_of_users():
    assert EXTRAS["all"] == [f"gradhpo[{','.join(USED)}]"]
