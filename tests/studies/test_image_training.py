"""The study `image_training` on noise in place of photographs: its derivatives, its accounts."""

import csv
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("optuna")
pytest.importorskip("scipy")

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.estimators.reverse import reverse  # noqa: E402
from gradhpo.studies import image_training  # noqa: E402
from gradhpo.studies.image_training import problem, study  # noqa: E402
from gradhpo.studies.image_training.augment import DRAWS, STRENGTHS, augmented  # noqa: E402
from gradhpo.studies.image_training.problem import Sizes  # noqa: E402
from gradhpo.testing import assert_trees_close, central_difference, unrolled_loss  # noqa: E402

SIZES = Sizes(steps=4, batch=5, train=12, val=8)


def noise(side, sizes=(30, 6)):
    rng = np.random.default_rng(0)
    train, test = (
        DataBatch(rng.integers(0, 256, (n, side, side, 3), np.uint8), rng.integers(0, 3, n))
        for n in sizes
    )
    return datasets.Dataset("cifar10", train, test, 3, {"a.png": "0" * 64})


def test_a_shift_by_a_whole_pixel_moves_the_image_and_the_other_draws_do_what_they_say():
    images = jax.random.uniform(jax.random.key(0), (1, 4, 4, 3))
    one, still = 2 / 3, dict.fromkeys(STRENGTHS, 0.0)  # of half an image of 4 pixels
    down = jnp.zeros((1, DRAWS)).at[0, 0].set(1.0)
    moved = augmented(images, down, still | {"shift": one})
    np.testing.assert_allclose(moved[0, :3], images[0, 1:], atol=1e-6)
    np.testing.assert_allclose(moved[0, 3], 0, atol=1e-6)
    all_on = jnp.ones((1, DRAWS))
    brighter = augmented(images, all_on, still | {"light": 0.1, "tint": 0.2, "contrast": 0.3})
    np.testing.assert_allclose(brighter, images * np.exp(0.3) + 0.3, atol=1e-6)
    middle = augmented(images, all_on, still | {"zoom": -np.log(3)})[0, 1:3, 1:3]
    bilinear = jax.image.resize(images, (1, 12, 12, 3), "linear")[0, 5:7, 5:7]
    np.testing.assert_allclose(middle, bilinear, atol=1e-6)


def test_the_hypergradient_is_that_of_the_validation_loss_in_every_number(x64):
    task = problem.task(noise(8), SIZES, problem.start(study.BY_HAND), seed=0).stored
    wide = lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype.kind == "f" else x  # noqa: E731
    (inner, window), lam = jax.tree.map(wide, (task.begin(SIZES.steps), task.hyperparams))
    got = jax.jit(partial(reverse(SIZES.steps).estimate, task.problem))((), inner, lam, window)
    want = central_difference(partial(unrolled_loss, task.problem, inner, window=window), lam)
    assert len(jax.tree.leaves(want)) == 30 and all(np.abs(jax.tree.leaves(want)) > 0)
    assert_trees_close(got.hypergrad, want, rtol=1e-5)


def test_batches_go_through_all_examples_and_mirror_half_of_them():
    data = noise(4).train
    images, labels, draws = problem.batches(data, Sizes(steps=60, batch=5), seed=0)
    assert images.dtype == np.uint8 and draws.shape == (60, 5, DRAWS) and np.abs(draws).max() <= 1
    mirrored = []
    for epoch in zip(*(x.reshape(10, 30, *x.shape[2:]) for x in (images, labels)), strict=True):
        rows = [_row(data, image) for image in epoch[0]]
        assert sorted(row for row, _ in rows) == list(range(30))
        assert [data.targets[row] for row, _ in rows] == epoch[1].tolist()
        mirrored += [flag for _, flag in rows]
    assert 0.4 < np.mean(mirrored) < 0.6


def _row(data, image):
    """Which example it is, and whether it is its mirror image."""
    for flag, other in ((False, image), (True, image[:, ::-1])):
        same = (data.inputs == other).all((1, 2, 3))
        if same.any():
            return int(same.argmax()), flag
    raise AssertionError("an image that is not among the examples")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results"), []
    config = study.Config(
        seeds=2, steps=4, batch_size=5, train_size=12, val_size=8, trainings=2, out=out
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, folder: noise(32))
        result = image_training.run(config, lines.append)
    report.write(result, out)
    return result, lines, out


def test_files_and_table(ran):
    result, lines, out = ran
    assert report.read(out).to_json() == result.to_json()
    assert list(result.methods) == ["reverse", "tpe", "fixed"] and len(lines) == 6
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    for method in result.methods.values():
        keys = {"val_loss", "val_accuracy", "test_loss", "test_accuracy", "seconds"}
        assert method.metrics.keys() == keys | {"val_loss_by_epoch"}
        assert all(np.isfinite(method.metrics[key].seeds).all() for key in keys)
    with open(out / "hyperparameters.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 30
    by_hand = {r["hyperparameter"]: float(r["value"]) for r in rows if r["method"] == "fixed"}
    assert by_hand["decay/conv2"] == pytest.approx(study.BY_HAND.decay)
    assert by_hand["rate/out/1"] == pytest.approx(study.BY_HAND.peak)


def test_equal_gradients_and_nobody_is_worse_than_the_start_that_all_share(ran):
    result, _, _ = ran
    spent = {
        name: each.gradient_evaluations + 2 * each.second_order_products
        for name, each in result.methods.items()
    }
    assert spent["fixed"] == SIZES.steps
    assert spent["reverse"] - SIZES.steps < spent["tpe"] <= spent["reverse"]
    losses = {name: each.metrics["val_loss"].seeds for name, each in result.methods.items()}
    for name in ("reverse", "tpe"):  # another program rounds otherwise
        assert (losses[name] <= losses["fixed"] + 1e-5).all()
