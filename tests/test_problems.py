"""The seven problems of `gradhpo.examples.problems`: short, tuned in all that they declare, and
better for it."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo import cli
from gradhpo.examples import problems
from gradhpo.report import read
from gradhpo.tuning import History

LIBRARIES = {
    "nnx_cnn": "flax",
    "equinox_schedule": "equinox",
    "linen_loader": "flax",
    "maml": "flax",
    "label_noise": "jax",
    "three_scalars": "jax",
    "transformer": "jax",
}
FILES = {p.stem: p for p in Path(problems.__path__[0]).glob("*.py") if p.stem != "__init__"}
EVERY = pytest.mark.parametrize("name", LIBRARIES)
LINES = 45  # of code, as a user writes it


def problem(name):
    pytest.importorskip(LIBRARIES[name])
    pytest.importorskip("sklearn")  # digits
    return importlib.import_module(f"{problems.__name__}.{name}")


def command(name):
    """The command that the docstring gives, as arguments of `gradhpo`."""
    text = ast.get_docstring(ast.parse(FILES[name].read_text("utf-8")))
    (found,) = re.findall(r"gradhpo (tune (?:.*\\\n)*.*)", text)
    return shlex.split(found.replace("\\\n", " "))


def test_there_are_seven():
    assert FILES.keys() == LIBRARIES.keys()


@EVERY
def test_it_is_short(name):
    text = FILES[name].read_text("utf-8")
    docstring = ast.parse(text).body[0]
    code = text.splitlines()[docstring.end_lineno :]
    assert sum(bool(line.strip()) for line in code) <= LINES


@EVERY
def test_every_hyperparameter_is_connected(name):
    """Adam moves each by its rate, unless its hypergradient is zero; of weights of examples those
    that are seen."""
    task = problem(name).task(seed=0)
    words = command(name)
    method = words[words.index("--method") + 1] if "--method" in words else "one_step"
    T = None if task.train is None else 3
    estimator = {"reverse": gh.reverse(T or 5), "one_step": gh.one_step()}[method]
    history = History(task)
    state = gh.tune(task, estimator, optax.adam(0.1), episodes=1, T=T, callback=history)
    assert history.metrics["n_rejected"] == 0 and np.isfinite(history.metrics["val_loss"]).all()
    before, after = jax.device_get((task.stored.hyperparams, state.hyperparams))
    moved = jax.tree.map(
        lambda old, new: np.isfinite(new).all() and (new != old).any(), before, after
    )
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
@EVERY
def test_tuned_it_beats_the_same_training_left_alone(name, tmp_path, monkeypatch):
    """By the command of its docstring, on data that nothing was tuned on, over five seeds."""
    problem(name)
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command(name), "--out", "a"]) == 0
    untuned, tuned, _ = read("a").methods.values()
    metric = "test_loss" if "test_loss" in tuned.metrics else "val_loss"  # MAML: on new curves
    difference = tuned.paired_difference[metric]
    assert len(tuned.metrics[metric].seeds) == 5 and difference.to == "untuned"
    assert difference.summary.ci95[1] < 0
