"""The study `maml`: its files, its costs, what a few meta-steps learn, and the published errors."""

import csv

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from gradhpo import report  # noqa: E402
from gradhpo.examples.maml import loss  # noqa: E402
from gradhpo.studies.maml import study  # noqa: E402
from gradhpo.studies.maml.published import PUBLISHED  # noqa: E402
from gradhpo.studies.maml.training import ENTRIES, draw, errors, initial  # noqa: E402

METHODS = ("maml", "reptile")
TINY = {"seeds": 3, "shots": (5,), "tasks": 2, "meta_steps": 2, "tests": 4, "method": METHODS}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results"), []
    result = study.run(study.Config(**TINY, out=out), lines.append)
    report.write(result, out)
    return result, lines, out


def test_files(ran):
    result, lines, out = ran
    assert report.read(out).to_json() == result.to_json()
    assert list(result.methods) == ["maml 5", "reptile 5"]
    assert (out / "errors.png").read_bytes().startswith(b"\x89PNG")
    with (out / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    compared = [row for row in PUBLISHED if row.shots == 5 and row.method == "maml"]
    assert [(row["source"], float(row["published"])) for row in rows] == [
        (row.source, row.mse) for row in compared
    ]
    by_method = result.methods["maml 5"].metrics
    assert float(rows[0]["mean"]) == pytest.approx(by_method["test_mse"].mean)
    assert len(lines) == 2 + len(compared)


def test_costs(ran):
    """Two meta-steps of two tasks: a training and a validation gradient and one more backwards."""
    result, *_ = ran
    costs = {
        name: (row.gradient_evaluations, row.second_order_products)
        for name, row in result.methods.items()
    }
    assert costs["maml 5"] == (12, 4)
    assert costs["reptile 5"] == (4 * 6, 0)


@pytest.mark.parametrize("name", ENTRIES)
def test_before_meta_training_all_start_alike(name):
    """And the errors are those of gradient descent written out."""
    states = initial(name, 2, 1)
    tasks = draw(5, 7, (3,), jax.random.key(0))
    found = errors(name, states, tasks)
    assert found.shape == (2, 11)
    weights = [ENTRIES["maml"].start(*of_seed(initial("maml", 2, 1), seed))[0] for seed in (0, 1)]
    for seed, w in enumerate(weights):
        after = []
        for i in range(3):
            support, query = jax.tree.map(lambda x, i=i: x[i, 0], tuple(tasks))
            slope = jax.grad(loss)(w, None, support)
            moved = jax.tree.map(lambda w, g: w - 0.01 * g, w, slope)
            after.append([loss(w, None, query), loss(moved, None, query)])
        np.testing.assert_allclose(found[seed, :2], np.mean(after, axis=0), rtol=1e-5)


def of_seed(states, seed):
    return jax.tree.map(lambda x: x[seed], (states.params, states.hyperparams))


@pytest.mark.parametrize("settings", [{"shots": ()}, {"tasks": 0}, {"method": ("reverse",)}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        study.Config(**settings)


@pytest.mark.slow
def test_maml_reaches_the_published_errors(tmp_path):
    """After a fifth of the authors' meta-steps, one step leaves less than Li et al. report."""
    config = study.Config(shots=(5, 10), method=("maml",), out=tmp_path)
    rows = study.run(config).methods
    for row in PUBLISHED:
        if row.method == "maml" and row.source == "Li" and row.shots in config.shots:
            assert rows[f"maml {row.shots}"].metrics["test_mse"].mean < row.mse
