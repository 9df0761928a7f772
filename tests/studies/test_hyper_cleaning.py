"""Hyper-cleaning: the network, the first update of each method by hand, what a run writes."""

import csv
import json
import os
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies.hyper_cleaning import Config, model, network, run, study, tables  # noqa: E402
from gradhpo.studies.hyper_cleaning.training import Data, Run, Setting, train, train_by_search  # noqa: E402
from gradhpo.studies.shared.detection import detection  # noqa: E402

SMALL = {
    "dataset": ("digits",),
    "train_size": 150,
    "val_size": 150,
    "updates": 12,
    "seeds": 2,
    "label_noise": (0.5,),
}


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain_logits(params, images):
    """The network with the convolutions of XLA."""
    x = images
    for name in ("conv1", "conv2", "conv3"):
        stride = 2 if x.shape[1] > 4 else 1
        shapes = ("NHWC", "HWIO", "NHWC")
        w, b = params[name]["w"], params[name]["b"]
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=shapes) + b
        )
    return x.reshape(len(x), -1) @ params["dense"]["w"] + params["dense"]["b"]


@pytest.mark.parametrize("side", [8, 9, 28])
def test_the_network_is_that_of_plain_convolutions(side):
    images = np.random.default_rng(0).random((5, side, side, 1), np.float32)
    params = network.init(0, images)
    if side != 9:
        assert params["dense"]["w"].shape == (4 * 4 * 8, 10)
    want, got = plain_logits(params, images), network.logits(params, network.patches(images))
    np.testing.assert_allclose(got, want, atol=1e-5)


# -- one run -------------------------------------------------------------------------------


def losses(params, images, labels):
    scores = jax.nn.log_softmax(plain_logits(params, images))
    return -jnp.take_along_axis(scores, labels[:, None], 1)[:, 0]


@jax.jit
def sgd(params, velocity, lam, images, labels):
    def loss(params):
        return jnp.mean(jax.nn.sigmoid(lam) * losses(params, images, labels))

    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params))
    return jax.tree.map(lambda w, v: w - 0.1 * v, params, velocity), velocity


@jax.jit
def term(before, after, lam, train, val):
    """`alpha_t B_t`: what the example's weight in step t does to the validation loss after it."""
    alpha = jax.grad(lambda w: jnp.mean(losses(w, *val)))(after)
    _, slopes = jax.jvp(lambda w: losses(w, *train), (before,), (alpha,))
    s = jax.nn.sigmoid(lam)
    return -0.1 * s * (1 - s) * slopes / len(slopes)


@pytest.fixture(scope="module")
def trial():
    """60 noisy digits, 40 clean ones, and a network."""
    images, labels = datasets.digits().train
    labels = np.array(labels, np.int32)
    labels[:20] = (labels[:20] + 3) % 10
    cut = [
        DataBatch(images[rows], labels[rows])
        for rows in (slice(60), slice(100, 140), slice(200, 240))
    ]
    return cut, network.init(1, images)


@pytest.mark.parametrize(
    "method, momentum, gamma", [("t1t2", "fresh", 0.0), ("greedy", "carried", 0.7)]
)
def test_updates_are_those_written_out(trial, method, momentum, gamma):
    """Two updates after 3 steps each: the first moves by the rate of Adam, 0.1, against the
    hypergradient; the second shows what became of momentum."""
    parts, params = trial
    data = Data(*(model.examples(each) for each in parts))
    found = train(Setting(method, momentum, 3, gamma), params, data, updates=2, points=2)
    lam = m = v = jnp.zeros(60)
    velocity = jax.tree.map(jnp.zeros_like, params)
    images, labels = parts[0]
    for count in (1, 2):
        if momentum == "fresh":
            velocity = jax.tree.map(jnp.zeros_like, params)
        h = jnp.zeros(60)
        for _ in range(3):
            before = params
            params, velocity = sgd(params, velocity, lam, images, labels)
            h = gamma * h + term(before, params, lam, tuple(parts[0]), tuple(parts[1]))
        m, v = 0.9 * m + 0.1 * h, 0.999 * v + 0.001 * h**2
        step = m / (1 - 0.9**count) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
        lam = lam - 0.1 * step
        accuracy = np.mean(plain_logits(params, parts[2].inputs).argmax(-1) == parts[2].targets)
        assert found.test[count - 1, 1] == pytest.approx(float(accuracy), abs=1e-6)
    np.testing.assert_allclose(found.weights, jax.nn.sigmoid(lam), atol=2e-3)
    assert found.stopped in found.test[:, 1]


def test_a_budget_is_kept_by_projection(trial):
    """The first update by hand; the weights are the hyperparameters themselves."""
    parts, params = trial
    data = Data(*(model.examples(each) for each in parts))
    setting = Setting("reverse", "fresh", 3, 0.0, budget=0.7)
    found = train(setting, params, data, updates=1, points=1)

    @jax.jit
    @jax.grad
    def hypergradient(lam):
        w, velocity = params, jax.tree.map(jnp.zeros_like, params)
        for _ in range(3):
            slope = jax.grad(lambda w: jnp.mean(lam * losses(w, *parts[0])))(w)
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope)
            w = jax.tree.map(lambda w, v: w - 0.1 * v, w, velocity)
        return jnp.mean(losses(w, *parts[1]))

    h = hypergradient(jnp.full(60, 0.7))
    step = 0.05 / (jnp.abs(h) + 1e-8)  # of Adam; the nearest point with the sum is by these
    moved = 0.7 - step * h
    want = moved - (moved.sum() - 42) * step / step.sum()
    assert want.min() > 0
    np.testing.assert_allclose(found.weights, want, atol=1e-4)
    assert found.weights.sum() == pytest.approx(42, rel=1e-5)


def test_fixed_trains_and_leaves_the_weights_alone(trial):
    parts, params = trial
    data = Data(*(model.examples(each) for each in parts))
    found = train(Setting("fixed", "carried", 3, 0.9), params, data, updates=2, points=1)
    assert (found.weights == 0.5).all() and found.test.shape == (1, 2)


@pytest.mark.parametrize("budget", [None, 0.7])
def test_a_search_holds_the_weights_it_draws(trial, budget):
    """The first with equal weights; of some that of the lowest validation loss."""
    pytest.importorskip("optuna")
    parts, params = trial
    data = Data(*(model.examples(each) for each in parts))
    setting = Setting("random", "fresh", 3, 0.0, budget)
    fixed, size = setting._replace(method="fixed"), {"updates": 2, "points": 1}
    equal = train(fixed, params, data, **size)
    found = train_by_search(setting, params, data, **size, trials=1, seed=0)
    np.testing.assert_allclose(found.weights, equal.weights, rtol=1e-5)
    drawn = [
        setting.drawn(np.random.default_rng(seed).uniform(size=60).astype(np.float32))
        for seed in range(2)
    ]
    losses = [train(fixed, params, data, **size, lam=lam).last[2] for lam in drawn]
    assert len({equal.last[2], *losses}) == 3  # weights matter
    found = train_by_search(setting, params, data, **size, trials=8, seed=0)
    held = train(fixed, params, data, **size, lam=setting.drawn(found.weights))
    assert found.last[2] == pytest.approx(held.last[2], rel=1e-5)
    assert found.last[2] < equal.last[2] and np.ptp(found.weights) > 0.5
    assert found.weights.min() >= 0
    if budget is not None:
        assert found.weights.mean() == pytest.approx(budget, rel=1e-5)


# -- the study -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    config = Config(**SMALL, method=("one_step",), momentum=("fresh",), out=out)
    result = run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_study_writes_a_valid_result_and_its_figures(ran):
    config, result, lines = ran
    assert list(result.methods) == ["fixed", "one_step"]
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    for figure in ("accuracy.png", "weights.png"):
        assert (config.out / figure).read_bytes().startswith(b"\x89PNG")
    assert len(lines) == 2 * 2 + 2 and all(line.startswith("hyper_cleaning") for line in lines)
    method = result.methods["one_step"]
    assert method.second_order_products == 12 * 10
    assert np.shape(method.metrics["test_accuracy_by_epoch"].seeds) == (2, 12)


def test_weights_of_wrong_labels_fall(ran):
    config, result, _ = ran
    rows = read_rows(config.out / "detection.csv")
    assert [row["seed"] for row in rows] == ["0", "1"]
    for row in rows:
        assert float(row["auc"]) > 0.75  # chance: 0.5
        assert float(row["weight_clean"]) > 0.5 > float(row["weight_wrong"])
    difference = result.methods["one_step"].paired_difference["val_loss"]
    assert difference.to == "fixed" and max(difference.summary.seeds) < 0
    table = read_rows(config.out / "table.csv")
    assert [row["method"] for row in table] == ["fixed", "one_step"]
    assert table[1]["products"] == "10.0" and table[1]["published"] == ""


def test_searches_get_the_gradients_of_the_dearest_method():
    pytest.importorskip("optuna")
    methods = ("t1t2", "greedy", "random")
    result = run(Config(**{**SMALL, "seeds": 1}, method=methods, momentum=("fresh",)))
    cost = {name: each.gradient_evaluations for name, each in result.methods.items()}
    greedy = cost["greedy"] + 2 * result.methods["greedy"].second_order_products
    assert cost["random"] == round(greedy / 120) * 120 > cost["t1t2"]


def trials(accuracies):
    """Runs that end at these accuracies and were better, by the validation data, before."""
    weights, wrong = np.array([0.1, 0.9, 0.8]), np.array([True, False, False])
    return [
        tables.Trial(
            Run(np.array([[1.0, x + 0.1], [2.0, x]]), np.array([[1.0, 0.9], [2.0, 0.8]]), weights),
            wrong,
        )
        for x in accuracies
    ]


def test_the_published_table_stands_beside_ours(tmp_path):
    cells = [tables.Cell("mnist", 0.5, "carried"), tables.Cell("mnist", 0.5, "fresh")]
    found = {"fixed": trials([0.4, 0.5]), "greedy": trials([0.7, 0.8])}
    results = dict.fromkeys(cells, found)
    rows = tables.rows(results, {"fixed": 0.0, "greedy": 10.0})
    assert [row.method for row in rows] == ["fixed", "greedy"] * 2
    assert rows[1].accuracy == pytest.approx(0.75) and rows[1].stopped == pytest.approx(0.85)
    assert (rows[1].auc, rows[1].published, rows[1].published_half) == (1.0, 0.7773, 0.017)
    assert tables.told(rows[1]).endswith("published 77.7 ± 1.7 %")
    assert tables.draw_accuracy(results, 200, tmp_path / "a.png").stat().st_size > 5000
    summaries = study._summaries(results, {"fixed": (10, 0), "greedy": (20, 10)})
    assert list(summaries)[1] == "mnist 0.5 carried greedy"
    difference = summaries["mnist 0.5 fresh greedy"].paired_difference["test_accuracy"]
    assert difference.to == "mnist 0.5 fresh fixed"
    assert difference.summary.mean == pytest.approx(0.3)


def test_clean_examples_are_the_first_test_images_or_training_images():
    rng = np.random.default_rng(0)
    train, test = (
        DataBatch(rng.random((n, 2, 2, 1)), rng.integers(0, 10, n).astype(np.int32))
        for n in (50, 30)
    )
    data = datasets.Dataset("mnist", train, test, 10)
    make = partial(Config, train_size=9, val_size=12)
    part = study._parts(data, make(), 0.5, 0)
    assert (part.val.inputs == test.inputs[:12]).all()
    assert (part.test.inputs == test.inputs[12:]).all()
    everything = study._parts(data, make(val_size=30), 0.5, 0)
    assert (everything.val.inputs == test.inputs).all() and everything.test is everything.val
    own = study._parts(data, make(validation="train"), 0.5, 0)
    assert (own.test.inputs == test.inputs).all() and len(own.val.targets) == 12
    pool = {image.tobytes() for image in own.train.inputs}
    assert not pool & {image.tobytes() for image in own.val.inputs}
    for each in (part, everything):  # the same seed trains on the same examples, as noisy
        assert (each.train.targets == own.train.targets).all()
    with pytest.raises(ValueError, match="30 test images"):
        study._parts(data, make(val_size=40, train_size=5), 0.5, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"updates": 0}, "updates"),
        ({"momentum": ()}, "momentum"),
        ({"budget": 0.0}, "budget"),
        ({"method": ("sgd",)}, "method"),
        ({"method": ("hyperdistill",)}, "momentum fresh"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_detection():
    weights, wrong = np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, False, True, True])
    assert detection(weights, wrong) == pytest.approx((2 / 3, 0.875, 0.7, 0.3))
    assert detection(1 - weights, wrong).auc == pytest.approx(0.125)
    assert detection(np.full(4, 0.6), wrong)[:2] == (0.0, 0.5)
    assert detection(weights, wrong, below=0.6).f1 == pytest.approx(0.8)


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with MNIST")
def test_mnist_in_the_order_of_the_paper():
    """With momentum started fresh, after 100 updates: no HPO < T1-T2 < greedy; AUC of 0.9."""
    config = Config(
        dataset=("mnist",), label_noise=(0.5,), momentum=("fresh",), seeds=2, updates=100
    )
    result = run(config)
    mean = {name: each.metrics["test_accuracy"].mean for name, each in result.methods.items()}
    assert mean["fixed"] + 0.1 < mean["t1t2"] < mean["greedy"] - 0.03
    assert mean["fixed"] + 0.1 < mean["implicit_neumann"] < mean["greedy"] - 0.03
