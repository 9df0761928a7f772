"""The study `sinusoid`: its training against loops written out, its counts, files and bar."""

import csv
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from gradhpo import report  # noqa: E402
from gradhpo.meta import Sinusoids, adapt  # noqa: E402
from gradhpo.studies import sinusoid  # noqa: E402
from gradhpo.studies.sinusoid import problem, settings, training  # noqa: E402
from gradhpo.studies.sinusoid.settings import SETTINGS, Setting  # noqa: E402

STEPS, EPISODES = 4, 2
SMALL = Setting(steps=STEPS, episodes=EPISODES)


@pytest.fixture(scope="module")
def drawn():
    return problem.draw(1, EPISODES, Sinusoids(STEPS), tests=6)


def only(drawn):
    return jax.tree.map(lambda x: x[0], drawn)


def test_one_step_and_reptile_are_the_loops_written_out(drawn):
    """Momentum that begins anew in every episode, Adam that goes on, the mean of ten heads."""
    head, body, tasks, _ = only(drawn)
    adam = optax.adam(1e-3)

    @jax.jit
    def step(head, velocity, body, slots, batch, query):
        """Ten heads, one body."""

        def moved(body, w, v, batch):
            v = jax.tree.map(lambda m, g: 0.9 * m + g, v, jax.grad(problem.mse)(w, body, batch))
            return jax.tree.map(lambda w, v: w - 0.01 * v, w, v), v

        def after(body, w, v, batch, query):
            w, v = moved(body, w, v, batch)
            return problem.mse(w, body, query), (w, v)

        one = jax.vmap(jax.grad(after, has_aux=True), in_axes=(None, 0, 0, 0, 0))
        slope, (head, velocity) = one(body, head, velocity, batch, query)
        slope = jax.tree.map(lambda g: g.mean(0), slope)
        updates, slots = adam.update(slope, slots)
        return head, velocity, optax.apply_updates(body, updates), slots

    slots = adam.init(body)
    for m in range(EPISODES):
        heads = jax.tree.map(lambda w: jnp.stack([w] * problem.TASKS), head)
        velocity = jax.tree.map(jnp.zeros_like, heads)
        for t in range(STEPS):
            batch, query = (
                jax.tree.map(lambda x: x[m, :, t], side)  # noqa: B023
                for side in tasks
            )
            heads, velocity, body, slots = step(heads, velocity, body, slots, batch, query)
        head = jax.tree.map(lambda w: w.mean(0), heads)
    found = training.train("one_step", SMALL, drawn)
    want = problem.judge(head, body, only(drawn).tests, STEPS, 0.9)
    assert found.test_mse.shape == (1, EPISODES)
    np.testing.assert_allclose(found.test_mse[0, -1], want, rtol=1e-3)
    assert np.isnan(found.theta).all()


def test_hyperdistill_without_discount_is_one_step(drawn):
    """And at theta = 0 it is first-order; one program serves all three numbers."""
    got = {
        theta: training.train("hyperdistill", replace(SMALL, gamma=0.0, theta=theta), drawn)
        for theta in (0.0, 1.0)
    }
    for theta, name in ((0.0, "fo"), (1.0, "one_step")):
        want = training.train(name, SMALL, drawn).test_mse
        np.testing.assert_allclose(got[theta].test_mse, want, rtol=2e-4)
    assert np.isnan(got[1.0].theta_fit).all() and (got[1.0].theta == 1).all()
    assert abs(got[0.0].test_mse - got[1.0].test_mse).max() > 1e-3


def test_a_test_task_is_learned_as_any_other(drawn):
    """The units of the fixed body are evaluated once; `adapt` evaluates them at every step."""
    head, body, _, tests = only(drawn)
    task = problem.problem(0.9)

    def error(x, y, truth):
        batches = jax.tree.map(lambda a: jnp.stack([a] * 7), (x, y))
        inner, _ = adapt(task, head, body, (batches, batches))
        return problem.mse(inner.params, body, (jnp.asarray(problem.GRID), truth))

    want = jnp.mean(jax.vmap(error)(*tests))
    got = problem.judge(head, body, tests, 7, 0.9)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_tests_are_sinusoids_and_tasks_differ(drawn):
    _, _, tasks, tests = only(drawn)
    for x, y, truth in zip(*tests, strict=True):
        np.testing.assert_allclose(np.interp(x, problem.GRID, truth), y, atol=5e-3)
    assert len({float(y[0]) for y in tests.y}) == 6
    x, _ = tasks.val
    assert x.shape == (EPISODES, problem.TASKS, STEPS, problem.QUERIES)
    assert len(np.unique(x)) == x.size  # new points at every step
    head, body = problem.initial(0)
    assert sum(w.size for w in jax.tree.leaves(body)) == problem.SIZE == 20_400
    for layer, inputs in zip([*body, head], (1, 100, 100, 100), strict=True):
        values = np.concatenate([x.ravel() for x in layer.values()])
        assert 0.95 < np.abs(values).max() * np.sqrt(inputs) <= 1


@pytest.mark.parametrize(
    "every, products",
    [
        # 3 products of the series and 2 of the residual and the mixed term, at 5 steps; a fit is
        # 2 T products in 30 inner-optimizations
        (1, {"fo": 0, "one_step": 30, "drmad": 30, "implicit_neumann": 25, "hyperdistill": 32}),
        (2, {"fo": 0, "one_step": 15, "drmad": 30, "implicit_neumann": 25, "hyperdistill": 17}),
    ],
)
def test_products_of_an_inner_optimization(every, products):
    setting = replace(SETTINGS["published"], every=every)
    runs = setting.episodes * problem.TASKS
    for name, count in products.items():
        assert training.cost(name, setting, problem.SIZE).products == count * runs


def test_run_writes_its_files(tmp_path):
    lines = []
    config = sinusoid.Config(
        setting="short", seeds=2, episodes=2, tests=5, method=("one_step", "hyperdistill")
    )
    result = sinusoid.run(config, lines.append)
    report.write(result, tmp_path)
    assert report.read(tmp_path).to_json() == result.to_json()
    assert (tmp_path / "test_mse.png").stat().st_size > 10_000
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["row"], second["row"]) == ("one_step", "hyperdistill")
    assert first["published"] == first["minus_one_step"] == first["minus_fo"] == ""
    difference = result.methods["hyperdistill"].paired_difference["test_mse"]
    assert difference.to == "one_step"
    assert float(second["minus_one_step"]) == pytest.approx(float(difference.summary.mean))
    with (tmp_path / "theta.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 and float(rows[0]["theta"]) > 0
    assert len(lines) == 4 and all(line.startswith("sinusoid: ") for line in lines)


def test_settings():
    assert sinusoid.Config(setting="others").seeds == 10
    rows = settings.rows("others")
    assert len({row.name for row in rows}) == len(rows)
    # Of thirty rows eight are the same run as another's: they are trained once.
    assert len({(row.method, settings.seen(row.method, row.setting)) for row in rows}) == 22
    names = [row.name for row in settings.rows("gamma", ("hyperdistill",))]
    assert names[:2] == ["hyperdistill 0", "hyperdistill 0.3"] and len(names) == 12
    for wrong, message in [
        ({"gamma": 1.5}, "gamma must be between 0 and 1"),
        ({"update_every": 4}, "must divide the 30 steps"),
        ({"method": ("t1t2",)}, "unknown method 't1t2'"),
        ({"tests": 0}, "tests must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sinusoid.Config(**wrong)


@pytest.mark.slow
def test_the_published_order_and_numbers():
    """Minutes. Prototype and paper: HyperDistill 0.33, DrMAD 1.09."""
    methods = sinusoid.run(sinusoid.Config()).methods
    scores = {name: method.metrics["test_mse"] for name, method in methods.items()}
    assert scores["hyperdistill"].mean <= 0.38
    assert 0.85 <= scores["drmad"].mean <= 1.35
    assert scores["drmad"].mean > max(s.mean for n, s in scores.items() if n != "drmad")
    for other in ("one_step", "fo"):
        high = report.paired(scores["hyperdistill"].seeds, scores[other].seeds).ci95[1]
        assert high < 0
