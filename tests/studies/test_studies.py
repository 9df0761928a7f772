"""The studies on images, each in a size that takes seconds: what they write, what they find."""

import csv
import json
import os
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import jax  # noqa: E402

from gradhpo import (
    datasets,  # noqa: E402
    report,  # noqa: E402
)
from gradhpo.examples import augmentation as augmentation_example  # noqa: E402
from gradhpo.examples import learning_rate as learning_rate_example  # noqa: E402
from gradhpo.examples import mnist as mnist_example  # noqa: E402
from gradhpo.studies.registry import load  # noqa: E402
from gradhpo.studies.shared.images import ImageConfig, cost, parts  # noqa: E402

TINY = {"train_size": 60, "val_size": 60, "seeds": 2, "episodes": 2}
# Study -> its settings, its rows, and its figures.
STUDIES = {
    "regularisation": (
        {"method": ("one_step",), "steps": 10},
        ["fixed", "one_step", "one_step online"],
        ["accuracy.png", "penalties.png"],
    ),
    "learning_rate": (
        {"method": ("reverse",), "steps": 5, "fast": True, "seeds": 3, "episodes": 30},
        ["fixed", "reverse", "reverse online"],
        ["accuracy.png", "rates.png"],
    ),
    "augmentation": (
        {"method": ("reverse",), "steps": 5},
        ["none", "fixed", "reverse", "reverse online"],
        ["accuracy.png", "images.png", "strengths.png"],
    ),
}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


@pytest.fixture(scope="module", params=STUDIES)
def ran(request, tmp_path_factory):
    """`(study, config, result, lines)` of one small run of each study."""
    study, lines = load(request.param), []
    out = tmp_path_factory.mktemp("results") / "new"
    config = study.Config(**{**TINY, **STUDIES[request.param][0]}, out=out)
    result = study.run(config, lines.append)
    report.write(result, out)
    return study, config, result, lines


def test_study_writes_a_valid_result_and_its_figures(ran):
    _, config, result, lines = ran
    _, rows, figures = STUDIES[result.study]
    assert list(result.methods) == rows
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert all(is_png(config.out / figure) for figure in figures)
    assert len(lines) >= 2 and all(line.startswith(result.study) for line in lines)
    for row, method in result.methods.items():
        assert np.isfinite(method.metrics["test_loss"].seeds).all()
        assert method.gradient_evaluations > 0
        if row != rows[0]:
            assert method.paired_difference["test_accuracy"].to == rows[0]


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def the_same_seeds_give_the_same_numbers(config, result, methods):
    again = load("regularisation").run(config).methods
    assert {name: method.to_json() for name, method in again.items()} == methods


def fast_is_smaller_and_rates_improve(config, result, methods):
    settings = result.to_json()["settings"]
    assert settings["seeds"] == 2 and settings["episodes"] == 20
    differences = methods["reverse"]["paired_difference"]["test_loss"]["seeds"]
    assert max(differences) < 0  # from a poor start even a few updates help
    assert methods["reverse"]["gradient_evaluations"] == 20 * (2 * 5 + 1) + 5
    assert methods["reverse online"]["second_order_products"] == 20 * 5


def strengths_follow_the_exact_hypergradient(config, result, methods):
    """Compared with SGD written out: training without augmentation, and the first update."""
    example = augmentation_example

    def as_they_are(params, lam, batch):
        return mnist_example.val_loss(params, lam, (batch.images, batch.labels))

    @partial(jax.jit, static_argnums=0)
    def train(loss, params, lam, batches):
        def step(state, batch):
            params, momentum = state
            slope = jax.grad(loss)(params, lam, batch)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, slope)
            return (jax.tree.map(lambda w, m: w - 0.03 * m, params, momentum), momentum), None

        zeros = jax.tree.map(jax.numpy.zeros_like, params)
        return jax.lax.scan(step, (params, zeros), batches)[0][0]

    def after(lam, params, batches, val):
        return mnist_example.val_loss(train(example.train_loss, params, lam, batches), lam, val)

    slope = jax.jit(jax.grad(after))
    moved = read_rows(config.out / "hyperparameters.csv")
    for seed in range(2):
        part = parts(datasets.digits(), config, seed)
        params = mnist_example.init(seed, part.train.inputs)
        source = example.batches(part.train, 2 * seed)
        batches = jax.tree.map(lambda *xs: np.stack(xs), *(source() for _ in range(5)))
        plain = mnist_example.val_loss(train(as_they_are, params, None, batches), None, part.test)
        got = methods["none"]["metrics"]["test_loss"]["seeds"][seed]
        assert got == pytest.approx(float(plain), rel=1e-5)
        found = slope(example.HYPERPARAMS, params, batches, part.val)
        for kind, g in found.items():  # the first step of Adam is its rate, 0.1
            want = np.log1p(np.exp(example.HYPERPARAMS[kind] - 0.1 * np.sign(g)))
            (row,) = [
                r
                for r in moved
                if (r["hyperparameter"], r["seed"], r["episode"]) == (kind, str(seed), "1")
            ]
            assert abs(g) > 1e-5 and float(row["value"]) == pytest.approx(float(want), rel=1e-3)
    assert methods["none"]["gradient_evaluations"] == 5
    assert methods["reverse"]["gradient_evaluations"] == 2 * (2 * 5 + 1) + 5


FINDINGS = {
    "regularisation": the_same_seeds_give_the_same_numbers,
    "learning_rate": fast_is_smaller_and_rates_improve,
    "augmentation": strengths_follow_the_exact_hypergradient,
}


def test_findings(ran):
    _, config, result, _ = ran
    methods = {name: method.to_json() for name, method in result.methods.items()}
    FINDINGS[result.study](config, result, methods)


@pytest.mark.parametrize("settings", [{"episodes": 0}, {"train_size": 0}, {"method": ("no",)}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ImageConfig(**settings)


def test_parts_are_disjoint_and_noise_is_in_the_training_labels_only():
    data = datasets.digits()
    clean = parts(data, ImageConfig(), seed=3)
    noisy = parts(data, ImageConfig(label_noise=0.5), seed=3)
    owner = {image.tobytes(): label for image, label in zip(*data.train, strict=True)}
    sizes = [400, 400, len(owner) - 800]
    assert [len(part.targets) for part in clean[:3]] == sizes
    assert len({image.tobytes() for part in clean[:3] for image in part.inputs}) == sum(sizes)
    for part in (clean.train, clean.val, clean.test, noisy.val, noisy.test):
        assert part.targets.tolist() == [owner[image.tobytes()] for image in part.inputs]
    assert not clean.wrong.any() and 0.4 < noisy.wrong.mean() < 0.5
    assert (noisy.train.targets != clean.train.targets).tolist() == noisy.wrong.tolist()


def test_costs_are_those_of_the_registry():
    config = ImageConfig(episodes=100, steps=20)
    assert cost("fixed", config) == (2000, 0)
    assert cost("t1t2", config) == (8000, 0)
    # Two fits of theta: 2 T + 1 gradients and 2 T products each.
    assert cost("hyperdistill", config) == (4000 + 2 * 41, 2000 + 2 * 40)


# -- the examples --------------------------------------------------------------------------


def test_retraining_takes_the_batches_of_the_tuning_run():
    """With an outer optimizer that does not move, tuning and training end at the same weights."""
    import optax

    from gradhpo.studies.shared.before_after import retrained
    from gradhpo.studies.shared.images import tuned

    config = ImageConfig(train_size=100, val_size=100, episodes=3, steps=4)
    part = parts(datasets.digits(), config, seed=1)
    fresh = partial(mnist_example.task, 1, part.train, part.val)
    state = tuned(fresh(), "one_step", config, optax.set_to_zero(), lambda m, state: None)
    again = retrained(fresh(), mnist_example.HYPERPARAMS, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, again)


@pytest.mark.parametrize(
    "example, runs",
    [(mnist_example, 3), (learning_rate_example, 10), (augmentation_example, 2)],
    ids=["mnist", "learning_rate", "augmentation"],
)
def test_an_example_by_itself_tells_before_and_after(example, runs, capsys):
    example.main(runs)
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before: test accuracy ") and after.startswith("after: test accuracy ")
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+(?:e-\d+)?", x)] for x in (before, after)]
    start = example.strengths(example.HYPERPARAMS) if example is augmentation_example else None
    usual = jax.tree.leaves(start) if start else np.exp(list(example.HYPERPARAMS.values()))
    assert numbers[0][1:] == pytest.approx([float(x) for x in usual], rel=1e-2)
    moved = np.abs(np.subtract(*(x[1:] for x in numbers))) > 0
    assert moved.any() and (example is not learning_rate_example or numbers[1][0] > numbers[0][0])


def test_rates_of_the_layers_act_on_their_layers():
    optimizer = learning_rate_example.layerwise_sgd({"a": np.log(0.5), "b": np.log(2.0)})
    grads = {"a": {"w": np.ones(2)}, "b": {"w": np.ones(2)}}
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    assert jax.tree.map(float, jax.tree.map(lambda x: x[0], updates)) == {
        "a": {"w": pytest.approx(-0.5)},
        "b": {"w": pytest.approx(-2.0)},
    }


def test_augmentation_shifts_turns_and_replays():
    augment, kinds = jax.jit(augmentation_example.augment), augmentation_example.KINDS
    image = np.zeros((9, 9, 1))
    image[4, 4] = 1.0
    still = dict.fromkeys(kinds, 0.0)

    def centre(image):
        y, x = np.mgrid[:9, :9]
        return np.array([(image[..., 0] * y).sum(), (image[..., 0] * x).sum()]) / image.sum()

    np.testing.assert_allclose(augment(image, 0, still), image, atol=1e-6)
    turned = augment(image, 0, still | {"rotation": 1.0})
    np.testing.assert_allclose(centre(np.asarray(turned)), [4, 4], atol=1e-5)
    strong = still | {"shift": 0.1}
    moved = jax.vmap(augment, (None, 0, None))(image, np.arange(300), strong)
    shifts = [centre(each) - 4 for each in np.asarray(moved)]
    np.testing.assert_allclose(np.std(shifts, axis=0), 0.1 * 8, rtol=0.15)  # 0.1 of the 8 pixels
    assert (augment(image, 5, strong) == augment(image, 5, strong)).all()
    noisy = augment(np.zeros((50, 50, 1)), 1, still | {"noise": 0.3})
    assert np.std(noisy) == pytest.approx(0.3, rel=0.1)


def test_every_strength_has_a_hypergradient():
    example = augmentation_example
    data = datasets.digits().train
    source = example.batches(data, seed=0)
    gradient = jax.jit(jax.grad(example.train_loss, argnums=1))
    found = gradient(mnist_example.init(0, data.inputs), example.HYPERPARAMS, source())
    assert sorted(found) == sorted(example.KINDS) and all(abs(g) > 1e-6 for g in found.values())


# -- the real thing ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with MNIST")
@pytest.mark.parametrize("name", STUDIES)
def test_mnist(name, tmp_path):
    study = load(name)
    config = study.Config(dataset="mnist", fast=True, out=tmp_path)
    result = study.run(replace(config, method=STUDIES[name][0]["method"]))
    baseline, *rows = result.methods.values()
    assert set(result.data) and len(baseline.metrics["test_loss"].seeds) == 2
    assert min(row.metrics["test_loss"].mean for row in rows) < baseline.metrics["test_loss"].mean
