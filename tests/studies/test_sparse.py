"""Few at a time: an update by hand, equal counts, a small run."""

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
from gradhpo.studies import sparse as study  # noqa: E402


def test_the_first_updates_are_those_written_out():
    rng = np.random.default_rng(1)
    train, val = (
        DataBatch(
            jnp.asarray(rng.normal(size=(n, 5)), jnp.float32),
            jnp.asarray(rng.integers(0, 10, n), jnp.int32),
        )
        for n in (20, 30)
    )

    def after(lam):
        w, v = jnp.zeros((6, 10)), jnp.zeros((6, 10))

        def losses(w, data):
            scores = jax.nn.log_softmax(data.inputs @ w[:5] + w[5])
            return -jnp.take_along_axis(scores, data.targets[:, None], 1)[:, 0]

        for _ in range(3):
            v = 0.9 * v + jax.grad(lambda w: jnp.mean(lam * losses(w, train)))(w)
            w = w - 0.1 * v
        return jnp.mean(losses(w, val))

    loss, h = jax.jit(jax.value_and_grad(after))(jnp.ones(20))
    dense, seen = study._updated("dense", 3, 1, train, val)
    assert float(seen[0]) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(dense, jnp.clip(1 - 0.1 * jnp.sign(h), 0, 1), atol=1e-3)
    some, _ = study._updated("top_20", 3, 1, train, val)
    gains = np.where(h > 0, h, 0)  # at the bound of 1 only those may move whose h is positive
    np.testing.assert_array_equal(np.flatnonzero(some != 1), np.sort(np.argsort(-gains)[:4]))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    sizes = {"train_size": 60, "val_size": 200, "steps": 10, "dense_updates": 3}
    config = study.Config(seeds=2, method=("dense", "top_20", "tpe"), **sizes, out=out)
    result = study.run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_the_study_moves_as_many_weights_by_every_method(ran):
    config, result, lines = ran
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert (config.out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert len(lines) == 2 * 3
    loss = {name: each.metrics["val_loss"].mean for name, each in result.methods.items()}
    assert loss["top_20"] < loss["dense"] < loss["tpe"]
    assert result.methods["dense"].second_order_products == 3 * 10
    assert result.methods["top_20"].second_order_products == 15 * 10
    assert result.methods["tpe"].gradient_evaluations == round(3 * 41 / 10) * 10


@pytest.mark.parametrize("settings", [{"steps": 0}, {"label_noise": 1.5}, {"train_size": 5}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        study.Config(**settings)
