"""Random search and TPE beside the gradients: the same trials again, what diverges, no Optuna."""

import sys

import numpy as np
import pytest

pytest.importorskip("optuna")

from gradhpo.tuning.searches import SEARCHES, require_optuna, search


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


def test_without_optuna_there_is_a_command_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[search\]", or name other methods'):
        require_optuna()
