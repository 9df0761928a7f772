"""The study `cosine`: its measure where the answers are known, and its files."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("flax")

from gradhpo import (
    datasets,  # noqa: E402
    report,  # noqa: E402
)
from gradhpo.core.dynamics import from_optax  # noqa: E402
from gradhpo.core.problem import BilevelProblem, Window  # noqa: E402
from gradhpo.core.source import fetch  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.studies import cosine  # noqa: E402
from gradhpo.studies.cosine import methods, problems, study  # noqa: E402
from gradhpo.studies.cosine.problems import Family  # noqa: E402
from gradhpo.studies.sinusoid.problem import given  # noqa: E402

STEPS, TASKS = 5, 4


def contraction() -> Family:
    """Every step forgets half of the weights, whatever the data: A = I / 2."""

    def train_loss(w, lam, batch):
        return jnp.sum(w**2) / 2 + jnp.dot(w, batch * jnp.sin(lam))

    def val_loss(w, lam, batch):
        return jnp.sum((w - batch) ** 2) + jnp.sum(jnp.sin(w) * lam)

    def sample(key):
        keys = jax.random.split(key)
        return Window(*(1 + jax.random.normal(key, (STEPS, 4)) for key in keys))

    return Family(
        "contraction",
        BilevelProblem(from_optax(train_loss, optax.sgd(0.5)), val_loss, begin=given),
        steps=STEPS,
        rate=0.5,
        batch=2,
        outer_rate=1e-2,
        start=lambda seed: (jnp.arange(4.0) + seed, jnp.linspace(-1.0, 1.0, 4)),
        sample=sample,
    )


@pytest.fixture(scope="module")
def family():
    return contraction()


def test_measure_on_a_contraction(family):
    """The discounted sum is exact at the rate of forgetting; the others by `jax.grad`."""
    params, lam = family.start(0)
    window = family.draw(jax.random.key(1), TASKS)
    got = methods.measure(family, params, lam, window)
    assert list(got) == list(methods.METHODS)

    @jax.jit
    @jax.vmap
    def by_hand(window):
        """Exact, direct, and the last term."""

        def after(lam, at_val, last_only):
            w = params
            for t in range(STEPS):
                here = jax.lax.stop_gradient(lam) if last_only and t < STEPS - 1 else lam
                w = w - 0.5 * (w + window.train[t] * jnp.sin(here))
            return family.problem.outer_loss(w, at_val, window.val[-1])

        exact = jax.grad(lambda x: after(x, x, False))(lam)
        return (
            exact,
            jax.grad(after, 1)(lam, lam, False),
            jax.grad(lambda x: after(x, x, True))(lam),
        )

    exact, direct, last = (np.asarray(x, np.float64) for x in by_hand(window))

    def angle(a, b):
        return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    half = got["discounted_sum 0.5"]
    for array in half:
        np.testing.assert_allclose(array, 1, rtol=1e-9)
    for name, want in (("fo", direct), ("one_step", last), ("discounted_sum 0", last)):
        np.testing.assert_allclose(got[name].whole, angle(want, exact), rtol=1e-4)
        ratio = np.linalg.norm(want, axis=-1) / np.linalg.norm(exact, axis=-1)
        np.testing.assert_allclose(got[name].ratio, ratio, rtol=1e-4)
    np.testing.assert_allclose(
        got["one_step"].indirect, angle(last - direct, exact - direct), rtol=1e-3
    )
    assert np.isnan(got["fo"].indirect).all()
    # Without slots there are none to ignore, and on a line of constant Jacobians DrMAD is exact.
    for name in ("drmad", "drmad, full"):
        np.testing.assert_allclose(got[name].whole, 1, rtol=1e-9)
    assert np.abs(got["N.IFT(10, 1)"].whole - 1).min() > 1e-6  # batches differ: there is no minimum


def test_run_writes_its_files(family, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "sinusoids", lambda: family)
    lines = []
    config = cosine.Config(family="sinusoid", seeds=2, tasks=4, checkpoints=3, every=1)
    result = cosine.run(config, lines.append)
    report.write(result, tmp_path)
    assert (tmp_path / "cosine.png").stat().st_size > 10_000
    assert len(lines) == 2 * 3 + 1 and all(line.startswith("cosine: ") for line in lines)
    method = result.methods["contraction: hyperdistill"]
    assert method.metrics["cosine_by_epoch"].seeds.shape == (8, 3)
    assert method.paired_difference["cosine"].to == "contraction: one_step"
    # A fit over 5 steps: 11 gradients and 10 products; then the steps and one update.
    assert (method.gradient_evaluations, method.second_order_products) == (11 + 6, 10 + 1)
    with (tmp_path / "cosine.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(methods.METHODS) * 2 * 4 * 3
    moved = {row["whole"] for row in rows if (row["method"], row["run"]) == ("one_step", "0")}
    assert len(moved) == 12  # tasks and checkpoints differ
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(methods.METHODS) * 3
    chosen = cosine.Config(family="sinusoid", seeds=1, tasks=4, checkpoints=2, method=("fo",))
    assert list(cosine.run(chosen).methods) == ["contraction: fo"]


def test_characters_are_tasks_of_omniglot(monkeypatch):
    noise = np.random.default_rng(0).uniform(size=(6, 20, 28, 28)).astype(np.float32)
    data = datasets.Dataset("omniglot", DataBatch(noise, np.zeros(6, np.int32)), None, 1)
    monkeypatch.setattr(datasets, "load", lambda name, directory=None: data)
    family, _ = problems.characters(channels=2)
    params, warp = family.start(0)
    assert sum(x.size for x in jax.tree.leaves((params, warp))) < 1e5
    window = jax.tree.map(lambda x: x[0], family.draw(jax.random.key(0), 2))
    batches = fetch(family.resident, window)
    images, (labels, _) = batches.train
    assert images.shape == (family.steps, 25, 28, 28, 1) and images.dtype == jnp.uint8
    assert set(np.unique(labels)) <= set(range(5))
    train, val = (set(np.unique(side.rows).tolist()) for side in window)
    assert not train & val
    first = jax.tree.map(lambda x: x[0], batches)
    assert family.problem.dynamics.parts is not None
    loss = family.problem.dynamics.parts.train_loss(params, warp, first.train)
    assert abs(float(loss) - np.log(5)) < 1


@pytest.mark.slow
def test_hyperdistill_is_closer_than_one_step_and_fo_at_every_checkpoint():
    methods = cosine.run(cosine.Config(family="sinusoid")).methods
    fo, one_step, distilled = (
        methods[f"sinusoid: {name}"].metrics["cosine_by_epoch"].mean
        for name in ("fo", "one_step", "hyperdistill")
    )
    assert (distilled > one_step).all() and (one_step > fo).all()
