"""Choices and numbers together: a step by hand, decided choices stay, a small run."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("optuna")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gradhpo import report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies import mixed  # noqa: E402
from gradhpo.studies.mixed import methods, problem, training  # noqa: E402

T = 3


@pytest.fixture(scope="module")
def posed():
    rng = np.random.default_rng(0)
    parts = [
        DataBatch(jnp.asarray(rng.normal(size=(n, 4)), jnp.float32), jnp.asarray(np.arange(n) % 2))
        for n in (12, 8, 6)
    ]
    params = problem.init(4, jax.random.key(0))
    return problem.Data(*parts), params, jax.random.split(jax.random.key(1), T)


def by_hand(stored, params, data, keys):
    """Validation loss after T steps of momentum, written out."""
    lam = {
        "activation": jax.nn.softmax(stored["activation"]),
        "width": jax.nn.softmax(stored["width"]),
        "rate": jnp.exp(stored["rate"]),
        "penalty": jnp.exp(stored["penalty"]),
        "pixel": jnp.exp(stored["pixel"]),
        "dropout": 0.9 * jax.nn.sigmoid(stored["dropout"]),
    }
    gates = sum(lam["width"][i] * (jnp.arange(32) < n) for i, n in enumerate((2, 8, 32)))

    def loss(w, part, key=None):
        x = part.inputs
        for i in (0, 1):
            z = x @ w[i]["w"] + w[i]["b"]
            acts = [z, jax.nn.sigmoid(z), jnp.maximum(z, 0)]
            x = sum(lam["activation"][j] * a for j, a in enumerate(acts)) * gates
            if key is not None:
                r = lam["dropout"]
                noise = jax.random.logistic(jax.random.fold_in(key, i), x.shape)
                score = jnp.log((1 - r) / r) + noise
                soft = jax.nn.sigmoid(score / 0.5)
                x = x * (soft + jax.lax.stop_gradient((score > 0) - soft)) / (1 - r)
        logp = jax.nn.log_softmax(x @ w[2]["w"] + w[2]["b"])
        return -jnp.mean(jnp.take_along_axis(logp, part.targets[:, None], 1))

    def penalised(w, key):
        rest = lam["penalty"][0] * jnp.sum(w[1]["w"] ** 2)
        rest += lam["penalty"][1] * jnp.sum(w[2]["w"] ** 2)
        return loss(w, data.train, key) + jnp.sum(lam["pixel"][:, None] * w[0]["w"] ** 2) + rest

    w, velocity = params, jax.tree.map(jnp.zeros_like, params)
    for key in keys:
        slope = jax.grad(penalised)(w, key)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope)
        rates = [jax.tree.map(lambda v, i=i: lam["rate"][i] * v, velocity[i]) for i in range(3)]
        w = jax.tree.map(jnp.subtract, w, rates)
    return loss(w, data.val)


def test_the_first_update_is_the_one_written_out(posed):
    data, params, keys = posed
    stored = training.spaces_of(data).store(problem.start(4))
    loss, h = jax.jit(jax.value_and_grad(by_hand))(stored, params, data, keys)
    got = training.follow(T, 1, 0.3, stored, params, data, keys)
    assert float(got.val_loss[0]) == pytest.approx(float(loss), rel=1e-5)
    moved = jax.tree.map(lambda x, g: x - 0.3 * g / (jnp.abs(g) + 1e-8), stored, h)
    for name, x in moved.items():  # the first step of Adam is as long for small derivatives
        np.testing.assert_allclose(got.last[name], x, atol=5e-3, err_msg=name)


def test_what_is_decided_stays_and_is_judged_as_it_was_trained(posed):
    data, params, keys = posed
    spaces = training.spaces_of(data)
    choices = {"activation": jnp.array([0.0, 0.0, 1.0]), "width": jnp.array([0.0, 1.0, 0.0])}
    stored = training.decided(spaces.store(problem.start(4)), choices)
    got = training.follow(T, 3, 0.3, stored, params, data, keys)
    for name, rows in choices.items():
        np.testing.assert_array_equal(got.last[name], stored[name])
        np.testing.assert_array_equal(spaces.value(got.last)[name], rows)
    assert (got.last["rate"] != stored["rate"]).all()
    val, _ = training.judged(T, spaces.value(stored), params, data, keys)
    assert float(val) == pytest.approx(float(got.val_loss[0]), rel=1e-5)


def test_when_a_value_was_reached():
    found = methods.Found({}, np.array([10, 20, 30]), np.array([np.inf, 0.5, 0.7]))
    np.testing.assert_array_equal(found.best, [np.inf, 0.5, 0.5])
    assert (found.reached(0.6), found.reached(0.4)) == (20.0, np.inf)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    sizes = {
        "train_size": 60,
        "val_size": 100,
        "steps": 5,
        "relaxed": 3,
        "held": 2,
        "enumerated": 3,
        "trials": 4,
    }
    config = mixed.Config(seeds=2, **sizes, out=out)
    result = mixed.run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_the_study_writes_a_valid_result(ran):
    config, result, lines = ran
    assert list(result.methods) == list(methods.METHODS)
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert (config.out / "losses.png").read_bytes().startswith(b"\x89PNG")
    with (config.out / "choices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 and {row["activation"] for row in rows} <= set(problem.ACTIVATIONS)
    assert [bool(row["relaxed_val_loss"]) for row in rows] == [True] * 2 + [False] * 6
    assert sum("the discrete optimum on" in line for line in lines) == 3
    assert result.methods["reverse"].second_order_products == 5 * 5
    assert result.methods["enumeration"].second_order_products == 9 * 2 * 3 * 5
    assert result.methods["tpe"].gradient_evaluations == 4 * 5


def test_enumeration_is_the_lowest_of_all_choices(ran):
    config, result, _ = ran
    with (config.out / "losses.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "enumeration"]
    lowest = [min(float(r["val_loss"]) for r in rows if r["seed"] == s) for s in "01"]
    np.testing.assert_allclose(
        result.methods["enumeration"].metrics["val_loss"].seeds, lowest, rtol=1e-6
    )


@pytest.mark.parametrize("settings", [{"steps": 0}, {"trials": 0}, {"held": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mixed.Config(**settings)


@pytest.mark.slow
def test_the_discrete_optimum_with_fewer_gradients_than_searches():
    """An hour; nine of ten seeds."""
    lines = []
    mixed.run(mixed.Config(), lines.append)
    same = next(line for line in lines if line.startswith("mixed: reverse: the discrete optimum"))
    assert int(same.split(" on ")[1].split()[0]) >= 9
    for name in ("random", "tpe"):
        said = f"mixed: {name}: as low as reverse after more than 30,000 gradients (median)"
        assert any(line.startswith(said) for line in lines)
