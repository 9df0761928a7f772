"""Hyper-cleaning with a budget: the projection, the first update by hand, a small run."""

import csv
import json
import os

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gradhpo import report, spaces  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies import hyper_cleaning_projected as study  # noqa: E402


def test_the_first_update_is_the_one_written_out():
    rng = np.random.default_rng(1)
    train, val = (
        DataBatch(
            jnp.asarray(rng.normal(size=(n, 5)), jnp.float32),
            jnp.asarray(rng.integers(0, 10, n), jnp.int32),
        )
        for n in (12, 8)
    )
    start, budget = jnp.full(12, 0.5), 6.0

    def losses(w, data):
        scores = jax.nn.log_softmax(data.inputs @ w[:5] + w[5])
        return -jnp.take_along_axis(scores, data.targets[:, None], 1)[:, 0]

    def after(lam):
        w = jnp.zeros((6, 10))
        for _ in range(3):
            slope = jax.grad(lambda w: jnp.mean(lam * losses(w, train)))(w)
            w = w - 0.1 * 12 / budget * slope
        return jnp.mean(losses(w, val))

    loss, h = jax.jit(jax.value_and_grad(after))(start)
    weights, seen = study._updated(3, 1, 0.02, budget, train, val)
    assert float(seen[0]) == pytest.approx(float(loss), rel=1e-5)
    moved = start - 0.02 * h / (jnp.abs(h) + 1e-8)  # the first step of Adam
    np.testing.assert_allclose(weights[0], spaces.budget(moved, budget), atol=1e-4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    sizes = {"train_size": 200, "val_size": 200, "steps": 20, "updates": 40, "outer_rate": 0.03}
    config = study.Config(dataset="digits", budget=(0.4, 0.5), **sizes, out=out)
    result = study.run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_study_writes_a_valid_result_and_finds_wrong_labels(ran):
    config, result, lines = ran
    assert list(result.methods) == ["all", "oracle", "R=80", "R=100"]
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert (config.out / "f1.png").read_bytes().startswith(b"\x89PNG")
    assert len(lines) == 2 * 4 + 2
    with (config.out / "detection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["budget"], row["seed"]) for row in rows[:2]] == [("R=80", "0"), ("R=80", "1")]
    assert all(float(row["f1"]) > 0.8 and float(row["auc"]) > 0.85 for row in rows)
    mean = {name: each.metrics["test_accuracy"].mean for name, each in result.methods.items()}
    assert mean["all"] < mean["R=100"] - 0.02
    assert result.methods["R=80"].second_order_products == 20 * 40


@pytest.mark.parametrize("settings", [{"budget": ()}, {"budget": (1.5,)}, {"updates": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        study.Config(**settings)


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with MNIST")
def test_mnist_comes_near_the_oracle():
    result = study.run(study.Config(budget=(0.5,), seeds=2))
    mean = {name: each.metrics["test_accuracy"].mean for name, each in result.methods.items()}
    assert mean["all"] < mean["R=1000"] - 0.02 and mean["R=1000"] > mean["oracle"] - 0.02
