"""`gradhpo tune` on a small task: its numbers against plain training, its files, its end."""

import csv
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo.report import read
from gradhpo.tuning import History, load_hyperparams, load_task

SHORT = ("--episodes", "4", "--steps", "5", "--outer-rate", "0.1")


def plain(task, rate, decay, episodes=4, steps=5):
    """Training written out: SGD with momentum, its slots fresh in every episode."""
    w = jnp.asarray(task.params)
    for episode in range(episodes):
        velocity = jnp.zeros(3)
        for row in task.train.indices(episode * steps, steps):
            batch = task.train.data[row]
            g = jax.grad(lambda w: jnp.mean((w - batch) ** 2) + decay * jnp.sum(w**2))(w)  # noqa: B023
            velocity = g + 0.5 * velocity
            w = w - rate * velocity
    return w


def test_the_three_trainings_are_what_they_say(gradhpo):
    status, out, err = gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--seeds", "2")
    assert status == 0 and "val_loss (lower is better)" in out and "seed 1, trained anew" in err
    result = read("a")
    assert list(result.methods) == ["untuned", "one_step", "trained anew"]
    for seed in range(2):
        task = load_task("small:strict", seed=seed)
        found = load_hyperparams("a", task.hyperparams, seed=seed)
        assert found["rate"] != task.hyperparams["rate"] and found["rate"].dtype == np.float32
        for name, lam in ("untuned", task.hyperparams), ("trained anew", found):
            w = plain(task, lam["rate"], lam["decay"])
            metrics = result.methods[name].metrics
            for side, data in ("val", task.val.data), ("test", task.test):
                loss = jnp.mean((w - data) ** 2)
                assert metrics[f"{side}_loss"].seeds[seed] == pytest.approx(float(loss), rel=1e-5)
            farthest = float(jnp.abs(w).max())
            assert metrics["val_farthest"].seeds[seed] == pytest.approx(farthest, rel=1e-5)
    assert result.methods["untuned"].gradient_evaluations == 20
    assert result.methods["one_step"].gradient_evaluations == 40
    assert result.methods["one_step"].second_order_products == 20


def test_the_tuned_training_is_that_of_the_library(gradhpo):
    assert gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--alone")[0] == 0
    task = load_task("small:strict")
    state = gh.tune(task, gh.one_step(), optax.adam(0.1), episodes=4, T=5)
    np.testing.assert_allclose(
        jax.tree.leaves(load_hyperparams("a", task.hyperparams)),
        jax.tree.leaves(task.values(state.hyperparams)),
        rtol=1e-6,
    )
    assert list(read("a").methods) == ["one_step"]


def test_the_files(gradhpo, here):
    gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--set", "rate=0.02", "--tensorboard")
    names = "curves.csv hypergradient.png hyperparams.json hyperparams.png losses.png optimizer.py"
    names += " report.html result.json seed0.csv seed0.jsonl tensorboard"
    assert sorted(os.listdir("a")) == names.split()
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert found["from"] == {"decay": 1.0, "rate": pytest.approx(0.02)}
    assert found["to"] == pytest.approx(found["values"])  # a space, no rounding
    assert found["status"] == {"OK": 20} and found["ended"] == "after all episodes"
    rows = [json.loads(line) for line in (here / "a/seed0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["hyperparams/rate"] == pytest.approx(found["to"]["rate"])
    with open("a/seed0.csv") as file:
        assert float(list(csv.DictReader(file))[-1]["val_loss"]) == pytest.approx(
            rows[-1]["val_loss"], rel=1e-6
        )


def test_the_optimizer_to_take_home(gradhpo, here):
    gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--set", "examples=10")
    scope = {"__file__": str(here / "a/optimizer.py")}
    exec((here / "a/optimizer.py").read_text(), scope)  # as `python a/optimizer.py` does
    optimizer, w = scope["optimizer"], jnp.ones(3)
    step, _ = optimizer.update(jnp.ones(3), optimizer.init(w), w)
    np.testing.assert_allclose(step, -scope["hyperparams"]["rate"] * np.ones(3))
    assert scope["task"].train.length == 10


def test_a_second_run_needs_another_place_or_the_word(gradhpo, here):
    gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--alone")
    status, _, err = gradhpo("tune", "small:strict", *SHORT, "--out", "a")
    assert status == 1 and "holds results already" in err
    status, *_ = gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--alone", "--overwrite")
    assert status == 0 and len((here / "a/seed0.jsonl").read_text().splitlines()) == 4


def test_patience_ends_the_tuning_and_not_the_others(gradhpo, here):
    arguments = ("--episodes", "40", "--steps", "5", "--patience", "2", "--out", "a")
    assert "ended early" in gradhpo("tune", "small:strict", *arguments)[2]
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert found["ended"] == "early" and found["episodes"] < 40
    curves = read("a").methods
    assert curves["one_step"].metrics["val_loss_by_epoch"].mean.shape == (found["episodes"],)
    assert curves["untuned"].metrics["val_loss_by_epoch"].mean.shape == (40,)


def test_an_interrupt_keeps_what_there_is(gradhpo, here, monkeypatch, ctrl_c):
    """The second seed is cut off; the table has the first, the files have both."""
    call = History.__call__

    def interrupted(self, episode, state):
        call(self, episode, state)
        self.seen = getattr(interrupted, "seen", 0) + 1
        interrupted.seen = self.seen
        if self.seen == 14:  # 3 x 4 episodes of the first seed, 2 of the second
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(History, "__call__", interrupted)
    status, out, err = gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--seeds", "3")
    assert status == 130 and err.endswith("gradhpo: interrupted\n") and "over 1 seed" in out
    seeds = json.loads((here / "a/hyperparams.json").read_text())["seeds"]
    assert [each["ended"] for each in seeds.values()] == ["after all episodes", "interrupted"]
    assert seeds["1"]["episodes"] == 2 and (here / "a/report.html").is_file()


def test_an_interrupt_of_the_first_training_keeps_that_one(gradhpo, here, monkeypatch, ctrl_c):
    call = History.__call__

    def interrupted(self, episode, state):
        call(self, episode, state)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(History, "__call__", interrupted)
    status, out, _ = gradhpo("tune", "small:strict", *SHORT, "--out", "a")
    assert status == 130 and list(read("a").methods) == ["one_step"]
    assert json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]["episodes"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["small:fixed", "--seeds", "2"], "make small:fixed a function that takes seed"),
        (["small:strict", "--method", "greedy:bar=1"], "greedy has the settings gamma"),
        (["small:strict", "--method", "fds"], "the method fds needs fds:pieces=..."),
        (["small:strict", "--method", "reverse:memory=tape"], "memory"),
        (["small:absent"], "has no 'absent'"),
    ],
)
def test_what_does_not_fit_is_one_line(gradhpo, arguments, message):
    status, out, err = gradhpo("tune", *arguments, "--out", "a")
    assert (status, out) == (1, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "option",
    [
        *("--seeds=0", "--episodes=0", "--steps=0", "--outer-rate=0", "--outer-rate=nan"),
        *("--method=none", "--method=tpe:gamma=1", "--method=fo:outer_rate=-1", "--trials=0"),
    ],
)
def test_settings_out_of_range_show_the_help(gradhpo, option, capsys):
    with pytest.raises(SystemExit) as raised:
        gradhpo("tune", "small:strict", option)
    assert raised.value.code == 2 and "gradhpo tune --help" in capsys.readouterr().err


def test_names_of_users_are_escaped_on_the_page(gradhpo, here):
    (here / "small.py").write_text(
        (here / "small.py").read_text().replace('"farthest"', '"<script>alert(1)</script>"')
    )
    gradhpo("tune", "small:strict", *SHORT, "--out", "a")
    text = (here / "a/report.html").read_text()
    assert "&lt;script&gt;" in text and "<script" not in text
    names = {each for each in re.findall(r"https?://[^\"]*", text) if "www.w3.org" not in each}
    assert not names  # nothing comes from the network


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lam: {"rate": lam["rate"]}, "first that differs is 'decay'"),
        (lambda lam: lam | {"rate": np.ones(2)}, r"'rate' of .* has shape \(\), but \(2,\)"),
    ],
)
def test_hyperparameters_of_another_task(gradhpo, change, message):
    gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--alone")
    lam = load_task("small:strict").hyperparams
    with pytest.raises(ValueError, match=message):
        load_hyperparams("a", change(lam))
    with pytest.raises(ValueError, match="no hyperparameters of seed 7; its seeds are 0"):
        load_hyperparams("a", lam, seed=7)


def test_a_task_with_a_step_of_its_own_has_no_optimizer():
    problem = gh.BilevelProblem(gh.from_update(lambda w, lam, batch: w), lambda w, lam, batch: w)
    task = gh.Task(problem, 1.0, 1.0, gh.InOrder(jnp.ones(2)), gh.InOrder(jnp.ones(2)))
    with pytest.raises(ValueError, match="no Optax optimizer to hand out"):
        task.optimizer(1.0)


def test_a_setting_of_the_method(gradhpo):
    arguments = ("--method", "discounted_sum:gamma=0.5,outer_rate=0.3", "--out", "a", "--alone")
    assert gradhpo("tune", "small:strict", *SHORT, *arguments)[0] == 0
    task = load_task("small:strict")
    method = gh.discounted_sum(0.5, 5)
    state = gh.tune(task, method, optax.adam(0.3), episodes=4, T=5)
    np.testing.assert_allclose(
        jax.tree.leaves(load_hyperparams("a", task.hyperparams)),
        jax.tree.leaves(task.values(state.hyperparams)),
        rtol=1e-6,
    )


def test_a_search_is_a_method_too(gradhpo, here):
    pytest.importorskip("optuna")
    arguments = ("--method", "tpe", "--trials", "6", "--out", "a")
    assert gradhpo("tune", "small:strict", *SHORT, *arguments)[0] == 0
    methods, task = read("a").methods, load_task("small:strict")
    assert methods["tpe"].gradient_evaluations == 6 * 20
    found = load_hyperparams("a", task.hyperparams)
    loss = jnp.mean((plain(task, found["rate"], found["decay"]) - task.val.data) ** 2)
    for name in ("tpe", "trained anew"):  # a search finds no schedule: anew it is the same
        assert methods[name].metrics["val_loss"].mean == pytest.approx(float(loss), rel=1e-4)
    rows = [json.loads(line) for line in (here / "a/seed0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["hyperparams/rate"] == pytest.approx(0.05)  # the start is tried first
    assert min(row["val_loss"] for row in rows) == pytest.approx(float(loss), rel=1e-4)


def test_a_warm_start_begins_at_the_best_probe(gradhpo, here):
    pytest.importorskip("optuna")
    far = ("--set", "rate=1e-4", "--alone", "--overwrite")
    gradhpo(
        "tune", "small:strict", *SHORT, *far, "--method", "random", "--trials", "5", "--out", "a"
    )
    probes = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]["values"]
    gradhpo("tune", "small:strict", *SHORT, *far, "--warm-start", "5", "--out", "b")
    tuned = json.loads((here / "b/hyperparams.json").read_text())["seeds"]["0"]
    assert tuned["from"] == pytest.approx(probes, rel=1e-5) and tuned["from"]["rate"] > 1e-3
    assert read("b").methods["one_step"].gradient_evaluations == 40 + 5 * 20
