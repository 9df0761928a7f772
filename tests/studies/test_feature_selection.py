"""Which features matter: the data, an update by hand, the elastic net, a small run, the bar."""

import csv
import json
import os

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("optuna")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from scipy import optimize  # noqa: E402

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies import feature_selection as study  # noqa: E402
from gradhpo.studies.feature_selection import methods, problem  # noqa: E402


@pytest.fixture(scope="module")
def table():
    """Rows whose label depends on two of four features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 4)).astype(np.float32)
    y = (x[:, 0] - 2 * x[:, 1] + 0.3 * rng.normal(size=900) > 0).astype(np.int32)
    return datasets.Dataset("table", DataBatch(x, y), None, 2)


def test_noise_features_are_shuffled_columns(table):
    got = problem.data(table, (200, 300, 400), noise=6, seed=1)
    assert got.real == 4 and [len(p.targets) for p in got[:3]] == [200, 300, 400]
    x = np.concatenate([p.inputs for p in got[:3]])
    y = np.concatenate([p.targets for p in got[:3]])
    np.testing.assert_allclose(x[:200].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x[:200].std(0), 1, atol=1e-4)
    related = np.abs([np.corrcoef(column, y)[0, 1] for column in x.T])
    assert related[1] > 0.6 and related[4:].max() < 0.15
    again = problem.data(table, (200, 300, 400), noise=6, seed=1)
    np.testing.assert_array_equal(again.val.inputs, got.val.inputs)


def test_the_elastic_net_is_that_of_a_general_solver(table):
    """With w = p - m and bounds p, m >= 0 it is smooth: L-BFGS-B of scipy."""
    train = problem.data(table, (200, 300, 400), noise=6, seed=0).train
    lasso, ridge = 0.02, 0.03
    w = problem.trained(train, jnp.ones(10), lasso, ridge)

    @jax.jit
    @jax.value_and_grad
    def objective(z):
        w = z[:10] - z[10:20]
        loss = problem.loss({"w": w, "b": z[20]}, jnp.ones(10), train)
        return loss + lasso * jnp.sum(z[:20]) + ridge * jnp.sum(w**2)

    bounds = [(0, None)] * 20 + [(None, None)]
    found = optimize.minimize(
        lambda z: [np.asarray(x, float) for x in objective(z)],
        np.zeros(21),
        jac=True,
        bounds=bounds,
    ).x
    np.testing.assert_allclose(w["w"], found[:10] - found[10:20], atol=2e-3)
    assert 1 < np.count_nonzero(w["w"]) < 10


def test_the_first_update_is_the_one_written_out(table):
    got = problem.data(table, (40, 60, 50), noise=3, seed=0)
    price = 0.01

    def after(lam):
        w, v = problem.init(7), problem.init(7)
        for _ in range(4):
            slope = jax.grad(
                lambda w: (
                    problem.loss(w, lam["scale"], got.train)
                    + jnp.exp(lam["ridge"]) * jnp.sum(w["w"] ** 2)
                )
            )(w)
            v = jax.tree.map(lambda v, g: 0.9 * v + g, v, slope)
            w = jax.tree.map(lambda w, v: w - 0.05 * v, w, v)
        return problem.loss(w, lam["scale"], got.val)

    start = {"scale": jnp.ones(7), "ridge": jnp.log(jnp.float32(0.01))}
    h = jax.grad(after)(start)
    lam, used, stationarity = methods._updated("reverse", 4, 1, price, got.train, got.val)
    step = 0.02 / (jnp.abs(h["scale"]) + 1e-8)  # of Adam, as long as its first step is for h
    want = jnp.maximum(1 - step * h["scale"] - step * price, 0)
    np.testing.assert_allclose(lam["scale"], want, atol=2e-3)
    np.testing.assert_array_equal(used[0], want > 0)
    assert float(stationarity) > 0


@pytest.fixture(scope="module")
def ran(tmp_path_factory, table):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    sizes = {"train_size": 150, "val_size": 300, "test_size": 400, "noise": 20, "updates": 80}
    config = study.Config(dataset=("a9a",), seeds=2, price=0.005, **sizes, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, data_dir: table)
        result = study.run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_the_study_finds_the_two_features(ran):
    config, result, lines = ran
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert (config.out / "selection.png").read_bytes().startswith(b"\x89PNG")
    with (config.out / "selection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows[::2]] == list(methods.METHODS)
    for row in rows:
        if row["method"] in ("implicit", "reverse"):
            assert int(row["noise"]) <= 2 and int(row["real"]) >= 2
            assert float(row["outer_stationarity"]) < 0.05
        if row["method"] == "ridge":
            assert int(row["noise"]) == 20 and row["outer_stationarity"] == ""
    with (config.out / "features.csv").open(newline="") as file:
        found = [int(r["seeds"]) for r in csv.DictReader(file) if r["method"] == "implicit"]
    assert found[:2] == [2, 2]
    loss = {name: each.metrics["val_loss"].mean for name, each in result.methods.items()}
    assert loss["implicit"] < loss["ridge"]
    gradients, products = methods.cost("implicit", methods.Budget(10, 80, 0.0), 24)
    assert result.methods["tpe"].gradient_evaluations == pytest.approx(
        gradients + 2 * products, abs=problem.RETRAINING
    )
    assert any("% of the noise features off" in line for line in lines)


@pytest.mark.parametrize("settings", [{"dataset": ()}, {"price": -1.0}, {"noise": -1}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        study.Config(**settings)


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with a9a, ijcnn1")
def test_noise_features_are_switched_off_at_no_loss():
    """The bar: 95 of 100, and no validation loss more than with one penalty for all."""
    lines = []
    config = study.Config(seeds=5, method=("ridge", "implicit"))
    result = study.run(config, lines.append)
    for name in config.dataset:
        off = next(line for line in lines if f": {name}, implicit: " in line)
        assert float(off.split("implicit: ")[1].split(" %")[0]) >= 95
        loss = {m: result.methods[f"{name} {m}"].metrics["val_loss"] for m in config.method}
        assert report.paired(loss["implicit"].seeds, loss["ridge"].seeds).ci95[1] < 0
