"""The study `omniglot` on a made-up set of characters: its files, its updates against formulas."""

import csv
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.meta.images import FewShot  # noqa: E402
from gradhpo.studies.omniglot import study  # noqa: E402
from gradhpo.studies.omniglot.model import Alternating  # noqa: E402
from gradhpo.studies.omniglot.published import ACCURACY  # noqa: E402
from gradhpo.studies.omniglot.training import STEPS, Learner, draw  # noqa: E402

WAYS, SIDE = 3, 16


def characters():
    """Fifteen characters by twelve drawers: a pattern each, with noise."""
    noise = np.random.default_rng(0)
    patterns = noise.random((15, 1, SIDE, SIDE)) > 0.5
    pixels = np.clip(patterns + noise.normal(0, 0.3, (15, 12, SIDE, SIDE)), 0, 1)
    part = lambda rows: DataBatch(pixels[rows].astype(np.float32), np.zeros(len(pixels[rows])))  # noqa: E731
    return datasets.Dataset(
        "omniglot", part(slice(10)), part(slice(10, 15)), 1, {"a.png": "0" * 64}
    )


@pytest.fixture(scope="module")
def learner():
    images, labels = study.pixels_of(characters())
    assert images.shape == (180, SIDE, SIDE, 1) and labels.tolist() == sorted(12 * list(range(15)))
    return Learner(images, WAYS), FewShot(labels, WAYS, 1, 10, STEPS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results"), []
    config = study.Config(
        seeds=1, ways=(WAYS,), updates=4, points=2, tests=8, method=("greedy", "fo"), out=out
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, folder: characters())
        result = study.run(config, lines.append)
    report.write(result, out)
    return result, lines, out


def test_files(ran):
    result, lines, out = ran
    assert report.read(out).to_json() == result.to_json()
    assert list(result.methods) == ["fixed 3", "greedy 3", "fo 3"]
    assert result.methods["fo 3"].paired_difference["test_accuracy"].to == "greedy 3"
    assert (out / "accuracy_3.png").read_bytes().startswith(b"\x89PNG")
    with (out / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for method in ("greedy", "fo"):
        ours = result.methods[f"{method} 3"]
        assert float(rows[method]["accuracy"]) == 100 * ours.metrics["test_accuracy"].mean
        published = float(rows[method]["published"]), float(rows[method]["half"])
        assert published == ACCURACY[method][3]
        assert ours.metrics["test_accuracy_by_epoch"].seeds.shape == (1, 2)
    assert (rows["greedy"]["products"], rows["fo"]["products"]) == ("5", "0")
    costs = result.methods["greedy 3"], result.methods["fo 3"]
    assert [row.gradient_evaluations for row in costs] == [4 * 10, 4 * 6]
    assert len(lines) == 6 and all(line.startswith("omniglot: 3-way 1-shot") for line in lines)


def test_an_update_follows_the_method(learner):
    """From Adam's first moments: the hypergradient of the discounted sum, written out.

    Training is five steps with momentum on the same images, and begins where the last task began.
    """
    learner, sample = learner
    tasks = draw(sample, 0, 1)
    start, lam = learner.start(3)

    def batch(side):
        picked = jax.tree.map(lambda x: x[0, 0], getattr(tasks, side))
        return learner.images[picked.rows], picked.beside

    support, query = batch("train"), batch("val")
    loss = learner.model.val_loss

    def step(w, v, lam):
        v = jax.tree.map(lambda v, g: 0.9 * v + g, v, jax.grad(loss)(w, lam, support))
        return jax.tree.map(lambda w, v: w - 0.1 * v, w, v), v

    @jax.jit
    def terms(w, lam):
        """The direct term after every step, and alpha_t B_t."""

        def body(state, _):
            state, pullback = jax.vjp(lambda lam: step(*state, lam), lam)
            alpha, direct = jax.grad(loss, (0, 1))(state[0], lam, query)
            still = jax.tree.map(jnp.zeros_like, alpha)  # the velocity is not judged
            return state, (direct, pullback((alpha, still))[0])

        return jax.lax.scan(body, (w, jax.tree.map(jnp.zeros_like, w)), length=STEPS)[1]

    direct, indirect = terms(start, lam)
    weights = {"one_step": [0.0] * 4 + [1.0], "greedy": [0.9**4, 0.9**3, 0.9**2, 0.9, 1.0]}
    for name, each in weights.items():
        (state,) = learner.train(name, 3, tasks, 1)
        want = jax.tree.map(
            lambda d, terms, each=each: d[-1] + jnp.tensordot(jnp.array(each), terms, 1),
            direct,
            indirect,
        )
        moments = state.outer_opt_state[0].mu  # 0.1 times the hypergradient after one update
        jax.tree.map(
            lambda m, h: np.testing.assert_allclose(10 * m, h, rtol=1e-3, atol=1e-5), moments, want
        )
        jax.tree.map(np.testing.assert_array_equal, state.params, start)


def test_carried_weights_go_on(learner):
    learner, sample = learner
    (state,) = learner.train("fo", 3, draw(sample, 0, 1), 1, carry=1.0)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, learner.start(3)[0])
    assert min(jax.tree.leaves(moved)) > 0


def test_layers_by_turns():
    """Of a network in one piece, the even layers are the hyperparameters."""
    model = Alternating(28, ways=5)
    w, lam = model.init(jax.random.key(0))
    assert [w["layers"][i]["conv"]["kernel"].shape[2] for i in range(3)] == [1, 32, 32]
    shared = lam["layers"]
    assert [shared[i]["conv"]["kernel"].shape for i in range(3)] == [(3, 3, 32, 32)] * 3
    assert w["linear"]["kernel"].shape == (4 * 4 * 32, 5)
    images = jax.random.normal(jax.random.key(1), (3, 28, 28, 1))

    def layer(x, block, stride):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, block["conv"]["kernel"], (stride, stride), "SAME", dimension_numbers=dims
        )
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        return jax.nn.relu(x * block["norm"]["scale"] + block["norm"]["bias"])

    x = images
    for i, stride in enumerate((2, 2, 1, 1, 2, 1)):
        x = layer(x, (shared if i % 2 else w["layers"])[i // 2], stride)
    want = x.reshape(3, -1) @ w["linear"]["kernel"] + w["linear"]["bias"]
    np.testing.assert_allclose(model.logits(w, lam, images), want, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"ways": (1,)}, {"points": 7}, {"carry": 2.0}, {"method": ("drmad",)}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        study.Config(**settings)


@pytest.mark.slow
@pytest.mark.skipif("GRADHPO_DATA" not in os.environ, reason="needs GRADHPO_DATA with Omniglot")
def test_greedy_leads_on_omniglot(tmp_path):
    """Half of the updates are enough for the order."""
    config = study.Config(
        seeds=1, ways=(5,), updates=1000, method=("greedy", "one_step", "fo"), out=tmp_path
    )
    rows = study.run(replace(config)).methods
    greedy, *others = (rows[f"{m} 5"].metrics["test_accuracy"].mean for m in config.method)
    assert greedy > max(others) and 100 * greedy > ACCURACY["greedy"][5][0] - 3
