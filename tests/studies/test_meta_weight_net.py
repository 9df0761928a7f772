"""MetaWeightNet on noisy images: the first step by hand, a small run, the bars on MNIST."""

import csv
import json
import os

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.examples.mnist import cross_entropy, init  # noqa: E402
from gradhpo.studies.meta_weight_net import Config, run, training  # noqa: E402


@pytest.mark.parametrize("name, rate", [("one_step_virtual", 0.3), ("one_step_momentum", 0.03)])
def test_the_first_step_is_the_one_written_out(name, rate):
    """Looking ahead with `rate`, while the weights move by 0.03 in either case."""
    images, labels = datasets.digits().train
    train, val, test = (
        DataBatch(jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
        for rows in (slice(30), slice(50, 70), slice(100, 140))
    )
    rows = training.draws(4, (30, 20), batch_size=10, steps=1)
    got = training.train(training.METHODS[name], 4, (train, val, test), rows, 1)
    assert rows.train.shape == (1, 10) and rows.val.shape == (1, 10)

    seen = [[x[r[0]] for x in part] for part, r in zip((train, val), rows, strict=True)]
    params, lam = init(4, images), training.NET.init(jax.random.key(4))

    def each(params):
        one = jax.vmap(lambda image, label: cross_entropy(params, image[None], label[None]))
        return one(*seen[0])

    weights = jax.lax.stop_gradient(each(params))

    def step(lam, rate):
        slope = jax.grad(lambda w: jnp.mean(training.NET(lam, weights) * each(w)))(params)
        return jax.tree.map(lambda w, g: w - rate * g, params, slope)

    h = jax.grad(lambda lam: cross_entropy(step(lam, rate), *seen[1]))(lam)

    def check(new, old, g):  # the first step of Adam is its rate, 1e-4, against the sign of h
        large = jnp.abs(g) > 1e-6
        np.testing.assert_allclose(
            jnp.where(large, new - old, 0), jnp.where(large, -1e-4 * jnp.sign(g), 0), atol=2e-6
        )
        return int(large.sum())

    assert sum(jax.tree.leaves(jax.tree.map(check, got.hyperparams, lam, h))) > 100
    after = step(lam, 0.03)
    assert got.test[0, 0] == pytest.approx(float(cross_entropy(after, *test)), rel=1e-5)
    assert got.weights.shape == (1, 30)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    sizes = {"train_size": 300, "val_size": (100, 30), "steps": 90, "batch_size": 30}
    config = Config(dataset="digits", method=("one_step",), seeds=2, **sizes, out=out)
    result = run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_study_writes_a_valid_result_and_its_figures(ran):
    config, result, lines = ran
    rows = ["untouched", "stopped", "clean", "mixed", "one_step"]
    assert list(result.methods) == [f"{n} clean {name}" for n in (100, 30) for name in rows]
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    for figure in ("accuracy.png", "weights.png"):
        assert (config.out / figure).read_bytes().startswith(b"\x89PNG")
    assert len(lines) == 2 * 2 * 5 + 2 * 5
    assert all(line.startswith("meta_weight_net: ") for line in lines)
    assert result.methods["30 clean one_step"].second_order_products == 90


def test_early_stopping_is_the_best_point_of_untouched_training(ran):
    config, result, _ = ran
    for n in config.val_size:
        untouched, stopped = (
            result.methods[f"{n} clean {name}"].metrics for name in ("untouched", "stopped")
        )
        curves = untouched["test_accuracy_by_epoch"].seeds
        assert curves.shape == (2, 30)
        for curve, accuracy in zip(curves, stopped["test_accuracy"].seeds, strict=True):
            assert accuracy in curve
        assert (stopped["val_accuracy"].seeds >= untouched["val_accuracy"].seeds).all()


def test_the_table_has_differences_to_every_baseline(ran):
    config, result, _ = ran
    with (config.out / "table.csv").open(newline="") as file:
        table = {(row["cell"], row["method"]): row for row in csv.DictReader(file)}
    row = table["100 clean", "one_step"]
    for other in ("untouched", "stopped", "clean", "mixed"):
        mean = np.subtract(
            *(
                result.methods[f"100 clean {name}"].metrics["test_accuracy"].mean
                for name in ("one_step", other)
            )
        )
        assert float(row[f"more than {other}"]) == pytest.approx(float(mean))
        assert table["100 clean", "clean"][f"more than {other}"] == ""
    assert float(row["auc"]) > 0.6 and float(row["weight right"]) > float(row["weight wrong"])


@pytest.mark.parametrize("settings", [{"val_size": ()}, {"val_size": (0,)}, {"steps": 10}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with MNIST")
def test_bars_on_mnist():
    result = run(Config(seeds=2))
    accuracy = {name: each.metrics["test_accuracy"].mean for name, each in result.methods.items()}
    for name in ("one_step", "one_step_virtual"):
        reached = accuracy[f"1000 clean {name}"]
        assert reached > accuracy["1000 clean untouched"] + 0.15
        assert reached > accuracy["1000 clean stopped"] + 0.03
        assert accuracy[f"100 clean {name}"] > accuracy["100 clean clean"] + 0.10
    assert accuracy["1000 clean trap"] < accuracy["1000 clean trap_virtual"] - 0.15
