"""Crossover: the training written out, groups that nest, equal budgets, claims that are refused."""

import csv
import json
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("optuna")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from gradhpo import datasets, report, reverse  # noqa: E402
from gradhpo.report.intervals import interval  # noqa: E402
from gradhpo.report.results import MethodResult  # noqa: E402
from gradhpo.studies import crossover  # noqa: E402
from gradhpo.studies.crossover import problem, reaching, study  # noqa: E402
from gradhpo.tuning.methods import chosen  # noqa: E402
from gradhpo.tuning.sequences import by_hypergradients, by_search  # noqa: E402
from gradhpo.tuning.training import Length  # noqa: E402

T = 3


@pytest.fixture(scope="module")
def task():
    return problem.family(T)


def by_hand(lam, w, sides):
    """Validation loss after T steps, in float64 NumPy."""
    w = {name: np.asarray(x, float) for name, x in w.items()}
    flat = np.exp(spread(lam))
    first = problem.PIXELS * problem.HIDDEN
    decay = {"hidden": flat[:first].reshape(w["hidden"].shape)}
    decay["out"] = flat[first:].reshape(w["out"].shape)
    velocity = {name: np.zeros_like(x) for name, x in w.items()}

    def forward(part):
        hidden = np.tanh(part.inputs.astype(float) @ w["hidden"])
        scores = hidden @ w["out"]
        p = np.exp(scores - scores.max(1, keepdims=True))
        return hidden, p / p.sum(1, keepdims=True)

    for _ in range(T):
        train = sides["train"]
        hidden, p = forward(train)
        wrong = (p - np.eye(problem.CLASSES)[train.targets]) / len(p)
        back = wrong @ w["out"].T * (1 - hidden**2)
        slopes = {"out": hidden.T @ wrong, "hidden": train.inputs.astype(float).T @ back}
        for name in w:
            velocity[name] = 0.9 * velocity[name] + slopes[name]
            w[name] = (w[name] - 0.3 * velocity[name]) / (1 + decay[name])
    val = sides["val"]
    return -np.log(forward(val)[1][np.arange(len(val.targets)), val.targets]).mean()


def spread(lam):
    """A number for every weight, of H groups of neighbours as even as they can be."""
    edges = -(-np.arange(len(lam) + 1) * problem.LARGEST // len(lam))
    return np.repeat(lam, np.diff(edges))


def test_the_hypergradient_is_the_central_difference_of_the_training_written_out(task):
    one = task(3, 0)
    lam = np.array([-4.0, -5.0, -3.0])
    inner, window = one.begin(T)
    got = reverse(T).estimate(one.stored.problem, (), inner, jnp.float32(lam), window)
    value = partial(by_hand, w=problem.initial(0), sides=problem.data(0))
    assert float(got.info["val_loss"]) == pytest.approx(value(lam), rel=1e-5)
    h = 1e-4
    want = [(value(lam + h * e) - value(lam - h * e)) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(got.hypergrad, want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 10, 1000, 10000, problem.LARGEST])
def test_groups_are_of_neighbours_and_as_even_as_can_be(size):
    lam = np.linspace(-8, -2, size, dtype=np.float32)
    rates = problem.decays(jnp.asarray(lam), problem.initial(0))
    flat = np.concatenate([np.ravel(rates[name]) for name in ("hidden", "out")])
    np.testing.assert_allclose(np.log(flat), spread(lam), rtol=1e-5)


def test_few_hyperparameters_are_a_case_of_many(task):
    """The same decay everywhere is the same training, whatever the number of groups."""
    found = []
    for size in (1, 10, problem.LARGEST):
        one = task(size, 0)
        inner, window = one.begin(T)
        got = reverse(T).estimate(one.stored.problem, (), inner, jnp.full(size, -3.0), window)
        total = jnp.sum(got.hypergrad)  # of all groups together: that of the one
        found.append([float(got.info["val_loss"]), float(total)])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-4)


def test_a_third_of_the_training_labels_are_wrong_and_no_others():
    sizes = [*problem.SIZES.values()]
    digits = datasets.digits().train
    clean = datasets.split(digits, [*sizes, len(digits.targets) - sum(sizes)], seed=1)
    sides = problem.data(1)
    wrong = {
        side: np.mean(part.targets != sides[side].targets)
        for side, part in zip(problem.SIZES, clean, strict=False)
    }
    assert 0.2 < wrong["train"] < 0.35 and wrong["val"] == wrong["test"] == 0


# -- what was reached ----------------------------------------------------------------------


def cell(curve):
    """Of curves (seeds, parts)."""
    curve = np.array(curve, float)
    ends = {"val_loss": interval(curve[:, -1]), "test_loss": interval(curve[:, -1])}
    return reaching.Cell(MethodResult({**ends, "val_loss_by_epoch": interval(curve)}), 1.0)


def test_a_median_counts_what_was_never_reached():
    took = np.array([4.0, np.inf, 1.0, np.inf, 2.0, np.inf, 3.0, 5.0, 6.0, 7.0])
    assert reaching.middle(took) == (5.5, 2.0, np.inf)
    assert reaching.middle(np.full(10, np.inf)).median == np.inf


def test_a_claim_that_is_not_true_is_refused():
    """In the first part of ten: yes; in the second one, or never: no; below 100: nothing said."""
    random = cell([[9, 8, 7, 6, 5, 5, 5, 5, 5, 5]] * 3)
    first, second = cell([[5] + [4] * 9] * 3), cell([[6] + [4] * 9] * 3)
    never = cell([[6] * 10] * 3)
    cells = {(100, "random"): random, (100, "reverse"): first, (100, "one_step"): second}
    cells |= {(100, "hyperdistill"): never, (100, "tpe"): first}
    cells |= {(10, "random"): random, (10, "reverse"): second}
    said = [line for line in reaching.findings(cells, 1000) if "a tenth" in line]
    assert [line.split(": ")[0] for line in said] == [
        f"H = 100, {name}" for name in ("reverse", "one_step", "hyperdistill")
    ]
    assert [line.split(": ")[-1] for line in said] == [
        "yes (10 %, median)",
        "no (20 %, median)",
        "no (never, median)",
    ]


# -- a small run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("results") / "new", []
    config = crossover.Config(seeds=2, sizes=(1, 120), trials=22, steps=T, tpe_most=1, out=out)
    result = crossover.run(config, lines.append)
    report.write(result, out)
    return config, result, lines


def test_the_study_writes_a_valid_result(ran):
    config, result, lines = ran
    names = [f"H = {size}, {name}" for size in config.sizes for name in study.METHODS]
    names.remove("H = 120, tpe")
    assert list(result.methods) == names
    assert any("H = 120: tpe is left out" in line for line in lines)
    assert report.read(config.out).to_json() == result.to_json()
    json.loads((config.out / "result.json").read_text(), parse_constant=pytest.fail)
    assert (config.out / "crossover.png").read_bytes().startswith(b"\x89PNG")
    with (config.out / "crossover.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"H = {row['hyperparameters']}, {row['method']}" for row in rows] == names
    for row in rows:
        found = result.methods[f"H = {row['hyperparameters']}, {row['method']}"].metrics
        assert float(row["val_loss"]) == pytest.approx(float(found["val_loss"].mean))
        took = float(row["reached"])
        assert 0 < took <= config.budget if row["seeds_reached"] == "2" else took == np.inf
    to = {item.to for each in result.methods.values() for item in each.paired_difference.values()}
    assert to == {"H = 1, random", "H = 120, random"}


def test_every_method_takes_the_same_gradients_and_no_more(ran):
    config, result, _ = ran
    for name, method in result.methods.items():
        taken = method.gradient_evaluations + 2 * method.second_order_products
        dearest = 10 * T + 1  # a training by HyperDistill, which fits theta
        assert config.budget - dearest < taken <= config.budget, name


def test_searches_and_gradients_begin_with_the_same_training(task):
    make, length = partial(task, 120), Length(1, T)
    starts = [by_search(make, name, length, trials=1)[0] for name in ("random", "cmaes")]
    starts.append(next(by_hypergradients(make, chosen("reverse"), optax.adam(0.1), length, 100)))
    losses = [each.judged["val_loss"] for each in starts]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize("settings", [{"trials": 0}, {"sizes": (0,)}, {"sizes": (20000,)}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        crossover.Config(**settings)
