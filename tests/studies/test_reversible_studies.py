"""The studies by reversal, on made-up images and in a size that takes seconds."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from gradhpo import (
    datasets,  # noqa: E402
    report,  # noqa: E402
)
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies import chaos  # noqa: E402
from gradhpo.studies.registry import load  # noqa: E402
from gradhpo.studies.schedule import export, problem  # noqa: E402
from gradhpo.studies.shared.reversible import names, rows  # noqa: E402
from gradhpo.testing import assert_trees_close  # noqa: E402

STUDIES = {  # settings, methods, files
    "schedule": (
        {"iterations": 3, "steps": 6, "examples": 50, "momentum": 0.9},
        ["initial", "learned", "optax, initial", "optax, learned"],
        ["meta_curve.png", "schedules.png", "training.png", "meta_curve.csv", "training.csv"],
    ),
    "distill_data": (
        {"iterations": 5, "examples": 300},
        ["initial", "learned"],
        ["images.png", "loss.png"],
    ),
    "regularisation_map": (
        {"iterations": 3, "examples": 300},
        ["single", "learned"],
        ["penalties.png", "loss.png"],
    ),
    "chaos": (
        {"points": 4, "examples": 60, "seeds": 1},
        ["lower half", "upper half"],
        ["chaos.png", "chaos.csv"],
    ),
}


@pytest.fixture
def images(monkeypatch):
    """Ten classes of blurred noise."""
    noise = np.random.default_rng(0)
    centres = noise.uniform(0, 1, (10, 28, 28, 1))
    labels = noise.integers(0, 10, 2000).astype(np.int32)
    pixels = centres[labels] + 0.1 * noise.standard_normal((2000, 28, 28, 1))
    data = datasets.Dataset("noise", DataBatch(pixels.astype(np.float32), labels), None, 10)
    monkeypatch.setattr(datasets, "load", lambda name, directory=None: data)
    monkeypatch.setattr(problem, "LAYERS", (784, 4, 10))
    monkeypatch.setattr(chaos, "LAYERS", (784, 4, 10))
    return data


@pytest.mark.parametrize("name", STUDIES)
def test_study_writes_a_valid_result(name, images, tmp_path):
    settings, methods, files = STUDIES[name]
    study, lines = load(name), []
    result = study.run(study.Config(**{"seeds": 2, **settings}, out=tmp_path), lines.append)
    report.write(result, tmp_path)
    assert report.read(tmp_path).to_json() == result.to_json()
    assert list(result.methods) == methods
    assert all((tmp_path / file).stat().st_size > 50 for file in files)
    assert lines and all(line.startswith(name) for line in lines)
    assert "discarded" not in "".join(lines) or name == "chaos"
    for method in result.methods.values():
        assert np.isfinite(method.metrics["train_loss"].seeds).all()
    if name != "chaos":
        metric = "train_loss" if name == "schedule" else "val_loss"
        curve = result.methods["learned"].metrics[f"{metric}_by_epoch"].mean
        assert curve[-1] < curve[0]


def test_schedule_with_optax_alone_is_the_schedule_that_was_learned(tmp_path):
    """`schedule.json` and Optax take the steps of `reversible_sgd`."""
    noise, steps, groups = np.random.default_rng(0), 5, names(4)
    shapes = [(3, 2), (2,), (2, 2), (2,)]
    lam = problem.Schedule(
        jnp.asarray(noise.standard_normal((steps, len(groups))), jnp.float32),
        jnp.asarray(noise.standard_normal((steps, len(groups))), jnp.float32),
        jnp.zeros(len(groups)),
    )
    (tmp_path / "schedule.json").write_text(json.dumps(export.plain(lam)))
    found, tables = export.read_schedule(tmp_path / "schedule.json")
    assert found == ["weights 1", "biases 1", "weights 2", "biases 2"]
    ends = []
    for step in (export.optimizer(tables), problem.inner_optimizer(lam)):
        w = [jnp.ones(shape) for shape in shapes]
        slots = step.init(w)
        for _ in range(steps):
            g = jax.tree.map(jnp.sin, w)
            updates, slots = jax.jit(step.update)(g, slots, w)
            w = optax.apply_updates(w, updates)
        ends.append(w)
    assert_trees_close(ends[0], ends[1], 1e-3)  # ours rounds momenta to 2^-16


def test_rows_are_disjoint_and_centred(images):
    got = rows(images, 100, 50, 20)
    assert [len(part.targets) for part in got] == [100, 50, 20]
    flat = images.train.inputs.reshape(2000, -1)
    np.testing.assert_allclose(got.val.inputs, flat[100:150] - flat.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="2000 training examples, 3000 are asked"):
        rows(images, 1000, 1000, 1000)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("schedule", {"momentum": 1.0}),
        ("distill_data", {"iterations": 0}),
        ("chaos", {"points": 1}),
    ],
)
def test_wrong_settings_are_refused(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        load(name).Config(**settings)
