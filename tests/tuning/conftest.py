"""A small task in a module of its own, in an empty directory, and the command line."""

import sys

import pytest

from gradhpo import cli

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

TASK = """
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh
from gradhpo import spaces


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam["decay"] * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2), {"farthest": jnp.abs(w).max()}


PROBLEM = gh.BilevelProblem(gh.from_optax(loss, lambda lam: optax.sgd(lam["rate"], 0.5)), judge)


def task(seed=0, examples=20, **unused):
    data = np.random.default_rng(seed).normal(2.0, 1.0, (examples + 20, 3)).astype(np.float32)
    return gh.Task(
        PROBLEM,
        np.zeros(3, np.float32),
        {"decay": np.float32(1.0), "rate": np.float32(0.05)},
        train=gh.Resident(data[:examples], 5, seed=seed),
        val=gh.Resident(data[examples:], 8, seed=seed + 1),
        space=spaces.log(),
        test=data[:7],
    )


def strict(seed=0, examples=20):
    return task(seed, examples)


def nothing():
    return 1


fixed = task()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The directory, with `small.py` in it, which is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "small.py").write_text(TASK)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def gradhpo(here, capsys, monkeypatch):
    """`gradhpo("tune", "small:task") -> (status, stdout, stderr)`; as without the extra
    `checkpoint`, for these trainings are shorter than a save."""
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)

    def call(*arguments):
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    return call
