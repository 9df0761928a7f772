"""The benchmarks' committed counts: readable, complete, and one of them counted again."""

import importlib
import json
import sys
from pathlib import Path

import jax
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of `benchmarks/`, and forget it afterwards: its names are common ones."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module
    here = {path.stem for path in BENCHMARKS.glob("*.py")}
    for name in (set(sys.modules) - known) & here:
        del sys.modules[name]


@pytest.fixture
def committed():
    return json.loads((BENCHMARKS / "figures.json").read_text())


def test_figures_are_well_formed(committed, load):
    assert set(committed) == {"jax", "figures"}
    workloads = {name.partition("_")[0] for name in load("run").WORKLOADS}
    assert {key.split("/")[0] for key in committed["figures"]} == workloads
    for key, value in committed["figures"].items():
        assert key.rsplit("/", 1)[1] in ("flops", "temp", "bytes", "bits"), key
        assert value > 0, key


@pytest.mark.optimised
def test_a_count_is_reproduced(committed, load):
    if committed["jax"] != jax.__version__:
        pytest.skip(f"figures.json is of jax {committed['jax']}, this is {jax.__version__}")
    if jax.default_backend() != "cpu" or jax.config.jax_enable_x64:
        pytest.skip("figures.json is of 32-bit programs on CPU")
    w4, common = load("w4_scale"), load("_common")
    for name, program in w4.programs(w4.COUNTED, only=("sgd", "one_step")).items():
        assert common.flops(program) == pytest.approx(
            committed["figures"][f"w4/{name}/flops"], rel=0.02
        )


def test_growth_is_noticed(load):
    compare = load("run").compare
    old = {"a/flops": 100.0, "b/temp": 100.0, "c/flops": 1.0}
    assert compare(old, old) == []
    assert compare(old, {**old, "a/flops": 101.9, "b/temp": 50.0}) == []
    found = compare(old, {"a/flops": 103.0, "b/temp": 100.0, "d/flops": 1.0})
    assert [line.split(":")[0] for line in found] == ["a/flops", "c/flops", "d/flops"]


def test_an_absent_peer_is_skipped_with_a_message(load, monkeypatch, tmp_path, capsys):
    peers = load("peers")
    monkeypatch.setenv("GRADHPO_PEER_JAXOPT", str(tmp_path))
    assert peers.ask("jaxopt", "w3_jaxopt.py") == []
    assert "peer jaxopt skipped" in capsys.readouterr().out
