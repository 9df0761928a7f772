"""The tutorial: what must hold at any size, on a small one; its script and its demo."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from gradhpo.report import read, write
from gradhpo.studies.tutorial import problem
from gradhpo.studies.tutorial import study as tutorial
from gradhpo.studies.tutorial.findings import LITERAL, findings
from gradhpo.studies.tutorial.problem import Outcome
from gradhpo.studies.tutorial.study import (
    Config,
    DemoConfig,
    demo,
    run,
    separated,
    train,
)

ROOT = Path(__file__).parents[2]
SMALL = Config(seeds=2, episodes=3, steps=5)


SETTINGS = {"tutorial": SMALL, "separated": separated(SMALL)}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def outcomes(request):
    """Every method in one setting; both settings use the same compiled programs."""
    told = []
    found = train(request.param, lambda name, outcome: told.append(name))
    assert sorted(told) == sorted(found)
    return request.param, found


@pytest.mark.optimised
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_fo_is_fixed_bit_for_bit(config, monkeypatch):
    monkeypatch.setattr(tutorial, "_rows", lambda config: ["fixed", "fo"])
    found = train(config, lambda name, outcome: None)
    np.testing.assert_array_equal(found["fo"].losses, found["fixed"].losses)
    assert not found["fo"].moved.any() and not found["fixed"].moved.any()


def test_every_other_method_moves_every_seed(outcomes):
    _, found = outcomes
    for name in ("one_step", "t1t2", "greedy", "hyperdistill"):
        assert found[name].losses.shape == (2, 3) and np.isfinite(found[name].losses).all()
        assert found[name].moved.shape == (2, 517) and found[name].moved.any(axis=1).all(), name
    assert np.isfinite(found["hyperdistill"].theta_fits).all()


def test_the_literal_greedy_call_tunes_nothing(outcomes):
    config, found = outcomes
    assert (LITERAL in found) == (config.outer == "sgd")
    if LITERAL in found:
        assert not found[LITERAL].moved.any()


def by_hand(config):
    """Losses of seed 0 when it is trained a step at a time, by no code of the library."""
    start, data, indices = problem.draw(0, config.episodes, config.steps)
    weights, losses = start, []
    for episode in indices.train:
        weights = start if config.restart else weights
        for chosen in episode:
            batch = jax.tree.map(lambda x: x[chosen], data.train)  # noqa: B023
            weights = weights - config.learning_rate * jax.grad(problem.loss)(weights, batch)
        losses.append(problem.loss(weights, data.val))
    return np.array(losses)


def test_fixed_is_plain_training_on_the_drawn_batches(outcomes):
    config, found = outcomes
    np.testing.assert_allclose(found["fixed"].losses[0], by_hand(config), rtol=1e-5)


def test_the_data_have_the_noise_they_claim_and_a_clean_validation_set():
    wrong, batches = [], []
    for seed in range(20):
        weights, data, indices = problem.draw(seed, 1, 1)
        assert weights.shape == (517,) and data.train[0].shape == (500, 10)
        # Clusters lie far apart: the nearest mean of the clean examples tells the true class.
        inputs, labels = data.val
        means = np.stack([inputs[labels[:, k] == 1].mean(0) for k in range(5)])
        true = [((x[:, None] - means) ** 2).sum(-1).argmin(1) for x in (inputs, data.train[0])]
        assert (true[0] == labels.argmax(1)).mean() > 0.97
        wrong.append((true[1] != data.train[1].argmax(1)).mean())
        batches.append(indices.train)
    assert np.mean(wrong) == pytest.approx(0.2 * 4 / 5, abs=0.02)  # a fifth is redrawn as it was
    assert not np.array_equal(batches[0], batches[1])


def test_settings_share_data_and_batches():
    again = problem.draw(3, 2, 5)
    assert jax.tree.all(jax.tree.map(np.array_equal, problem.draw(3, 2, 5), again))


@pytest.mark.parametrize("adam", [False, True])
def test_outer_rule_is_the_optax_optimizer(adam):
    rates = np.array([0.3, 0.1], np.float32)
    rule = problem.outer_rule(np.asarray(adam), rates, per_episode=2)
    gradients = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    slots, other = rule.init(gradients[0]), optax.scale_by_adam().init(gradients[0])
    for i, gradient in enumerate(gradients):
        got, slots = rule.update(gradient, slots)
        want, other = optax.scale_by_adam().update(gradient, other)
        np.testing.assert_allclose(got, -rates[i // 2] * (want if adam else gradient), rtol=1e-6)


def test_run_returns_a_result_that_survives_the_file(tmp_path):
    config = dataclasses.replace(SMALL, out=tmp_path, method=("fo", "fixed"))
    lines = []
    result = run(config, lines.append)
    assert list(result.methods) == ["fixed", "fo"]
    difference = result.methods["fo"].paired_difference["val_loss"]
    assert difference.to == "fixed" and not difference.summary.seeds.any()
    assert result.methods["fo"].gradient_evaluations == 2 * 3 * 5
    assert sorted(line for line in lines if "done" in line) == [
        "fixed: 2 seeds done",
        "fo: 2 seeds done",
    ]
    pytest.importorskip("matplotlib")
    names = [path.name for path in write(result, tmp_path)]
    assert names == ["result.json", "curves.csv", "convergence.png"]
    assert read(tmp_path).to_json() == json.loads((tmp_path / "result.json").read_text())


def test_demo_prints_both_settings_and_ends_with_its_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.asdict(SMALL) | {"method": ("fo", "one_step", "hyperdistill")}
    demo(DemoConfig(**settings | {"out": DemoConfig.out}))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.fullmatch(r"demo: compute \d+\.\d s", lines[-1])
    assert [line.split(":")[0] for line in lines if line.startswith("Setting")] == [
        "Setting 1",
        "Setting 2",
    ]
    assert out.count("fo equals fixed bit for bit") == 2
    settings = [read("out/demo").settings, read("out/demo/separated").settings]
    assert [(s["outer"], s["learning_rate"]) for s in settings] == [("sgd", 0.05), ("adam", 0.005)]
    for name in ("result.json", "curves.csv", "separated/result.json", "separated/curves.csv"):
        assert f"wrote out/demo/{name}" in lines and Path("out/demo", name).is_file()
    pytest.importorskip("matplotlib")
    assert "wrote out/demo/hyperdistill_poc.png" in lines
    assert Path("out/demo/hyperdistill_poc.png").stat().st_size > 10_000
    assert os.listdir() == ["out"]  # figures/ is tracked


def test_findings_follow_the_numbers():
    def outcome(score, moved=0.0, fits=np.nan):
        losses = np.array([[score], [score + 0.2]])
        return Outcome(losses, np.full((2, 3), moved), np.array([[0.5, fits]] * 2))

    same = findings({"fixed": outcome(1.0), "one_step": outcome(1.0001, moved=1e-6)})
    assert "coincide" in same and "1.0e-06" in same and "cannot rank" in same
    apart = findings(
        {
            "fixed": outcome(1.0),
            "fo": outcome(1.0),
            "one_step": outcome(0.9),
            "hyperdistill": outcome(0.95, fits=-0.1),
        }
    )
    assert "Against fixed: one_step -0.1000, hyperdistill -0.0500, fo +0.0000" in apart
    assert "hyperdistill loses to one_step by +0.0500" in apart
    assert "2 of 4 fits are not positive" in apart and "bit for bit" in apart
    worse = findings({"fixed": outcome(1.0), "one_step": outcome(np.nan), "fo": outcome(1.1)})
    assert "one_step +nan" in worse and "fo tunes nothing here, yet" in worse
    assert findings({"fixed": outcome(1.0)}) == ""


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"steps": 7}, "multiple of greedy's 5"),
        ({"outer_rate": 0.0}, "outer_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"method": ("implicit",)}, "unknown method 'implicit'"),
    ],
)
def test_wrong_settings_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**fields)


def test_restart_carries_only_learning_rates_over():
    config = dataclasses.replace(SMALL, restart=True, method=("reverse",), steps=3)
    found = train(config, lambda name, outcome: None)
    np.testing.assert_allclose(found["fixed"].losses[0], by_hand(config), rtol=1e-5)
    assert found["reverse"].moved.any()


def test_the_script_runs_from_the_root_of_the_repository(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "code" / "demo_hyperdistill.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--M", "2", "--T", "5", "--seed", "7", "--plot"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\S.{13})  +(\d\.\d{4})", done.stdout, re.MULTILINE))
    assert rows["Fixed         "] == rows["FO            "]
    assert "HyperDistill    episode   2/2" in done.stdout
    assert (tmp_path / "out" / "demo_hyperdistill.png").stat().st_size > 10_000
    assert os.listdir(tmp_path) == ["out"]  # figures/ is tracked
