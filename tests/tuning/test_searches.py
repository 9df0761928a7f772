"""Random search and TPE beside the gradients: the same trials again, what diverges, no Optuna."""

import sys

import numpy as np
import pytest

pytest.importorskip("optuna")

from gradhpo.tuning.searches import MANY, SEARCHES, require_optuna, search, search_box


def suggest(trial):
    return {"x": trial.suggest_float("x", -1.0, 1.0), "n": trial.suggest_categorical("n", [0, 1])}


def judge(setting):
    return np.nan if setting["x"] > 0.9 else (setting["x"] - 0.3) ** 2 + setting["n"]


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_starts_where_it_is_told_and_comes_again(method):
    runs = [search(method, suggest, judge, 40, seed=3, first={"x": 0.95, "n": 1}) for _ in range(2)]
    assert runs[0].settings == runs[1].settings
    assert runs[0].settings[0] == {"x": 0.95, "n": 1} and runs[0].values[0] == np.inf
    assert judge(runs[0].best) == runs[0].values.min() < 0.05
    other = search(method, suggest, judge, 3, seed=4, first={"x": 0.95, "n": 1})
    assert other.settings[1:] != runs[0].settings[1:3]


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("size", [2, MANY])
def test_a_box_is_searched_from_its_center_by_the_same_draws_again(method, size):
    """On both sides of the number from which on Optuna is left out."""
    center = np.linspace(-1, 1, size)

    def values(seed, trials=12):
        seen = []
        search_box(method, center, 0.5, lambda x: seen.append(x) or np.sum(x**2), trials, seed)
        return np.array(seen)

    seen = values(3)
    assert seen.shape == (12, size)
    np.testing.assert_array_equal(seen[0], center)
    assert np.abs(seen - center).max() <= 0.5 + 1e-12 and len(np.unique(seen[:, 0])) == 12
    np.testing.assert_array_equal(seen, values(3))
    assert (seen[1:] != values(4)[1:]).any()


def test_cmaes_of_many_numbers_learns_where_random_draws_do_not():
    """Towards the corner of the box; what is not finite is worst, not an error."""
    lowest = {}
    for method in ("random", "cmaes"):
        seen = []

        def judge(x, seen=seen):
            seen.append(np.nan if len(seen) == 5 else np.mean(x))
            return seen[-1]

        search_box(method, np.zeros(MANY), 1.0, judge, 1000, seed=0)
        lowest[method] = np.nanmin(seen)
    assert lowest["random"] > -0.3 and lowest["cmaes"] < -0.6


def test_without_optuna_there_is_a_command_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[search\]", or name other methods'):
        require_optuna()
