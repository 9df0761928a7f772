"""The study of hypergradient descent in small sizes: its files, its models, its numbers."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from gradhpo import (
    datasets,  # noqa: E402
    report,  # noqa: E402
)
from gradhpo.studies.hypergradient_descent import study, sweeps, training  # noqa: E402
from gradhpo.studies.hypergradient_descent.models import MODELS, augmented, images  # noqa: E402
from gradhpo.studies.hypergradient_descent.optimizers import OPTIMIZERS, Recipe  # noqa: E402
from gradhpo.studies.hypergradient_descent.published import GRID, GRID_BASE, LOSSES  # noqa: E402
from gradhpo.studies.hypergradient_descent.training import BATCH, iterations_until, train  # noqa: E402

SMALL = {"dataset": "digits", "train_size": 2 * BATCH, "seeds": 2, "epochs": 2}


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    lines = []
    config = study.Config(**SMALL, out=tmp_path_factory.mktemp("study") / "new")
    result = study.run(config, lines.append)
    report.write(result, config.out)
    return config, result, lines


def test_the_six_methods_with_their_curves(compared):
    config, result, lines = compared
    saved = json.loads((config.out / "result.json").read_text())["methods"]
    assert list(saved) == ["sgd", "sgd_hd", "sgdn", "sgdn_hd", "adam", "adam_hd"]
    for method in result.methods.values():
        assert set(method.metrics) == {"train_loss_by_epoch", "val_loss_by_epoch"}
        assert all(m.seeds.shape == (2, 2) for m in method.metrics.values())
        assert method.gradient_evaluations == 4
    assert len(lines) == 4 and "seed 1, epoch 2/2" in lines[-1]
    assert {f.name for f in config.out.glob("*.png")} == {"sgd.png", "sgdn.png", "adam.png"}
    assert not (config.out / "published.csv").exists()  # the authors have no digits


def test_every_iteration_is_written_and_averages_to_the_epochs(compared):
    config, result, _ = compared
    rows = table(config.out / "iterations.csv")
    assert len(rows) == 6 * 2 * 4
    mine = [r for r in rows if (r["method"], r["seed"]) == ("sgdn_hd", "1")]
    assert [r["iteration"] for r in mine] == ["1", "2", "3", "4"]
    epochs = result.methods["sgdn_hd"].metrics["train_loss_by_epoch"].seeds[1]
    losses = np.array([float(r["train_loss"]) for r in mine]).reshape(2, 2).mean(1)
    np.testing.assert_allclose(epochs, losses, rtol=1e-6)
    rates = np.array([float(r["learning_rate"]) for r in mine])
    assert rates[0] == np.float32(1e-3) and len(set(rates)) > 2
    first = {r["train_loss"] for r in rows if r["seed"] == "0" and r["iteration"] == "1"}
    assert len(first) == 1  # same weights, same batch


def test_decay_divides_by_the_square_root_of_the_step():
    data = images("digits", None, 2 * BATCH)
    recipes = {"adam": Recipe("adam", decays=True), "adam_hd": Recipe("adam_hd", 0.0, True)}
    curves = train("logreg", recipes, (0.1,), data, 1, 2, lambda line: None)
    want = 0.1 / np.sqrt([1, 2, 3, 4])
    for name in recipes:
        np.testing.assert_allclose(curves[name][0].learning_rate.ravel(), want, rtol=1e-6)
    np.testing.assert_allclose(*(c[0].train_loss for c in curves.values()), rtol=1e-6)  # beta = 0


def test_rates_side_by_side_are_runs_of_their_own():
    data = images("digits", None, 2 * BATCH)
    recipes = {"sgd_hd": Recipe("sgd_hd", 1e-3)}
    quiet = lambda line: None  # noqa: E731
    both = train("logreg", recipes, (0.1, 0.01), data, 1, 1, quiet)["sgd_hd"]
    for rate, side in zip((0.1, 0.01), both, strict=True):
        alone = train("logreg", recipes, (rate,), data, 1, 1, quiet)["sgd_hd"][0]
        for a, b in zip(side, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)


def test_iterations_until_a_loss(monkeypatch):
    data = images("digits", None, 0)
    order = datasets.sample_indices(3, 1437, BATCH, 55)
    recipe = Recipe("sgdn_hd", 1e-3)
    rates = np.array([0.01, 1e-4, 0.01, 1e-5, 1e-6], np.float32)
    betas = np.array([1e-3, 0.0, 1e-3, 0.0, 0.0], np.float32)
    losses = train("logreg", {"r": recipe}, (0.01,), data, 4, 5, lambda line: None)["r"][0]
    losses = losses.train_loss[3].ravel()  # seed 3
    goal = float(np.sort(losses)[len(losses) // 3]) * (1 + 1e-5)
    want = int(np.argmax(losses <= goal)) + 1
    monkeypatch.setattr(training, "CHUNK", 7)
    found = iterations_until("logreg", recipe, rates, betas, 3, data, order, goal)
    assert found.tolist() == [want, 0, want, 0, 0]


def test_the_sweeps_write_their_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "RATES", (1e-1, 1e-2))
    monkeypatch.setattr(sweeps, "BETAS", (1e-6,))
    for name in GRID:
        monkeypatch.setitem(GRID, name, ((33,), (348,)))
    online = study.Config(**{**SMALL, "seeds": 1}, online_tuning=True, out=tmp_path / "online")
    result = study.run(online)
    report.write(result, online.out)
    assert len(result.methods) == 5 * 2
    pairs = table(online.out / "online_pairs.csv")
    assert len(pairs) == 3 * 2 and {r["seeds"] for r in pairs} == {"1"}
    assert len(table(online.out / "online.csv")) == 5 * 2 * 2
    grid = study.Config(**{**SMALL, "seeds": 1}, grid=True, cap=3, out=tmp_path / "grid")
    assert report.write(result := study.run(grid), grid.out) and result.methods == {}
    rows = table(grid.out / "grid.csv")
    assert len(rows) == 4 * 2 + 3 * 2
    assert {float(r["median"]) for r in rows} <= {1.0, 2.0, 3.0}
    for path in (online.out / "online.png", grid.out / "grid.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_else_needs_no_rate_takes_part(tmp_path):
    others = ("prodigy", "dadapt", "mechanize", "dog")
    config = study.Config(**{**SMALL, "seeds": 1}, method=("adam_hd", *others), out=tmp_path)
    result = study.run(config)
    report.write(result, tmp_path)
    assert list(result.methods) == ["adam_hd", *others] and (tmp_path / "others.png").exists()
    rates = [float(row["learning_rate"]) for row in table(tmp_path / "iterations.csv")]
    assert np.isfinite(rates).all() and set(OPTIMIZERS) == set(study.COMPARED) | set(others)


def test_published_numbers_are_complete():
    for rows in LOSSES.values():
        assert all(0 < x < 2.3 for row in rows.values() for pair in row.values() for x in pair)
    assert all(np.shape(rows) == (6, 6) for rows in GRID.values())
    assert all(len(row) == 6 for row in GRID_BASE.values())


@pytest.mark.parametrize("model, shape", [("logreg", (28, 28, 1)), ("mlp", (28, 28, 1))])
def test_linear_layers_start_as_in_pytorch(model, shape):
    params, _ = MODELS[model].init(jax.random.key(0), shape)
    sizes = [layer["w"].shape for layer in params]
    assert sizes == {"logreg": [(784, 10)], "mlp": [(784, 1000), (1000, 1000), (1000, 10)]}[model]
    for layer in params:
        bound = len(layer["w"]) ** -0.5
        assert 0.99 < float(jnp.abs(layer["w"]).max()) / bound <= 1
        assert 0.5 < float(jnp.abs(layer["b"]).max()) / bound <= 1


@pytest.mark.slow  # compiles sixteen layers, twice
def test_vgg_16():
    """15 million weights; dropout and averages in training only, as the layers promise."""
    model, key = MODELS["vgg"], jax.random.key(0)
    params, running = jax.jit(model.init, static_argnums=1)(key, (32, 32, 3))
    # Convolutions with biases, two numbers per channel, three linear layers.
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_714_688 + 2 * 4224 + 530_442
    inputs = jax.random.normal(key, (2, 32, 32, 3))

    @jax.jit
    def both(inputs, key):
        trained = model.scores(params, running, inputs, key)
        return *trained, *model.scores(params, running, inputs, None)

    scores, after, calm, same = both(inputs, key)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, running))
    assert not np.allclose(after[0]["mean"], running[0]["mean"])
    other, _, still, _ = both(inputs.at[1].set(0.0), key)
    assert not np.allclose(scores[0], other[0])  # by the statistics of its batch
    np.testing.assert_allclose(calm[0], still[0], rtol=1e-5)
    assert not np.allclose(scores, both(inputs, jax.random.key(1))[0])  # by dropout


def test_crops_and_flips():
    """Every result is a shifted, perhaps mirrored image with black where nothing was."""
    image = jnp.arange(1.0, 8 * 8 + 1).reshape(1, 8, 8, 1)
    many = np.asarray(augmented(jax.random.key(0), jnp.tile(image, (200, 1, 1, 1))))
    rows, seen = np.asarray(image[0, :, :, 0]), set()
    for got in many[..., 0]:
        padded = np.pad(rows, 4)
        found = [
            (flip, i, j)
            for flip in (False, True)
            for i in range(9)
            for j in range(9)
            if np.array_equal(got[:, ::-1] if flip else got, padded[i : i + 8, j : j + 8])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {s[0] for s in seen} == {False, True} and len({s[1:] for s in seen}) > 50


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"model": "vgg"}, "--dataset cifar10"),
        ({"train_size": 5}, "at least 128"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"grid": True, "model": "mlp"}, "logistic regression"),
        ({"method": ("lion",)}, "unknown method 'lion'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        study.Config(**settings)
