"""`gradhpo tune` on a small task: its numbers against plain training, its files, its end."""

import csv
import json
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo import cli as gh_cli
from gradhpo.report import read
from gradhpo.tuning import History, load_hyperparams, load_task
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.training import Length, left_alone, trained

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


def test_patience_ends_all_trainings_after_as_many_episodes(gradhpo, here):
    arguments = ("--episodes", "40", "--steps", "5", "--patience", "2", "--out", "a")
    assert "ended early" in gradhpo("tune", "small:strict", *arguments)[2]
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert found["ended"] == "early" and found["episodes"] < 40
    for method in read("a").methods.values():
        assert method.metrics["val_loss_by_epoch"].mean.shape == (found["episodes"],)


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
    with pytest.raises(ValueError, match="has no seed 7; its seeds are 0"):
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
    written = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert written["to"] == pytest.approx(written["values"])  # of the best trial, not of the last
    assert written["from"] == pytest.approx({"decay": 1.0, "rate": 0.05})
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
    assert probes["rate"] > 1e-3
    gradhpo("tune", "small:strict", *SHORT, *far, "--warm-start", "5", "--out", "b")
    tuned = json.loads((here / "b/hyperparams.json").read_text())["seeds"]["0"]
    assert tuned["from"]["rate"] == pytest.approx(1e-4)  # the start of the task
    task = load_task("small:strict")
    start = task.replace(hyperparams={name: np.float32(x) for name, x in probes.items()})
    state = gh.tune(start, gh.one_step(), optax.adam(0.1), episodes=4, T=5)
    values = {name: float(x) for name, x in task.values(state.hyperparams).items()}
    assert tuned["values"] == pytest.approx(values, rel=1e-4)
    assert read("b").methods["one_step"].gradient_evaluations == 40 + 5 * 20


def rewritten(here, **changes):
    """`small.py` with words replaced."""
    text = (here / "small.py").read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (here / "small.py").write_text(text)


CHOICES = (
    "space=spaces.log(),",
    'space={"decay": spaces.integer(0, 3), "rate": spaces.log(), "of": spaces.categorical(3)},',
)
OF_THREE = (
    '{"decay": np.float32(1.0),',
    '{"of": np.full(3, 1 / 3, np.float32), "decay": np.float32(1.0),',
)
MIXED = (
    "return jnp.mean((w - batch) ** 2) +",
    'return jnp.mean((lam["of"] @ jnp.array([0.0, 0.5, 1.0]) * w - batch) ** 2) +',
)


@pytest.mark.parametrize("method", ["one_step", "random", "one_step with a warm start"])
def test_discrete_hyperparameters_are_trained_with_once_they_are_decided(gradhpo, here, method):
    """A weight of 0 is where a categorical ends, and nowhere to start from."""
    rewritten(here, choices=CHOICES, of_three=OF_THREE, mixed=MIXED)
    name, *warm = method.split(" with")
    arguments = ("--method", name, "--out", "a", *(["--warm-start", "2"] if warm else []))
    assert gradhpo("tune", "small:strict", *SHORT, *arguments)[0] == 0
    values = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]["values"]
    assert sorted(values["of"]) == [0, 0, 1] and values["decay"] in (0, 1, 2, 3)
    assert np.isfinite(read("a").methods["trained anew"].metrics["val_loss"].mean)


@pytest.mark.filterwarnings("ignore::gradhpo.GradhpoWarning")
def test_a_training_that_diverges_is_nan_and_never_the_best(gradhpo, here):
    """Its weights are those before the step that was undone, whose loss means nothing."""
    far = ("--episodes", "3", "--steps", "40", "--set", "rate=1e9", "--out", "a")
    _, out, err = gradhpo("tune", "small:strict", *far)
    losses = {name: each.metrics["val_loss"].mean for name, each in read("a").methods.items()}
    assert np.isnan(losses["untuned"]) and np.isnan(losses["trained anew"])
    assert "untuned: val_farthest nan" in err
    pytest.importorskip("optuna")
    gradhpo("tune", "small:strict", *far, "--method", "random", "--width", "25", "--overwrite")
    best = read("a").methods["random"].metrics
    assert np.isfinite(best["val_loss"].mean)
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert found["values"]["rate"] < 100 and "NONFINITE_TRAIN_STATE" not in found["status"]


@pytest.mark.filterwarnings("ignore:.*updates")
@pytest.mark.parametrize("policy, status", [("skip", 0), ("stop", 0), ("raise", 1)])
def test_what_follows_a_rejected_update(gradhpo, here, policy, status):
    far = ("--episodes", "3", "--steps", "40", "--set", "rate=1e9", "--out", "a", "--alone")
    got, out, err = gradhpo("tune", "small:strict", *far, "--on-failure", policy)
    assert got == status and "one_step" in out  # what there is, is written
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    ends = {"skip": "after all episodes", "stop": "stopped", "raise": "failed"}
    assert (found["ended"], found["episodes"]) == (ends[policy], 3 if policy == "skip" else 1)
    last = err.splitlines()[-1]
    assert last.startswith("gradhpo: error: tune: NONFINITE_TRAIN_STATE") == (policy == "raise")


def test_an_interrupt_of_a_search_keeps_its_best_so_far(gradhpo, here, monkeypatch, ctrl_c):
    pytest.importorskip("optuna")
    from gradhpo.tuning import sequences

    train, calls = sequences.left_alone, []

    def third(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(sequences, "left_alone", third)
    status, out, _ = gradhpo("tune", "small:strict", *SHORT, "--method", "random", "--out", "a")
    assert status == 130 and "random" in out
    assert len((here / "a/seed0.jsonl").read_text().splitlines()) == 3
    assert (
        json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]["ended"]
        == "interrupted"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no more data")])
def test_what_goes_wrong_later_costs_nothing_that_is_done(gradhpo, here, monkeypatch, error):
    """While the task of the second seed is made: the first one is written."""
    from gradhpo.tuning import command

    train, calls = command.left_alone, []

    def late(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return train(*arguments, **options)

    monkeypatch.setattr(command, "left_alone", late)
    seeds = ("--seeds", "3", "--out", "a")
    if error is KeyboardInterrupt:
        assert gradhpo("tune", "small:strict", *SHORT, *seeds)[0] == 130
    else:  # not a refusal of ours: a bug, which is shown as such
        with pytest.raises(ValueError, match="no more data"):
            gradhpo("tune", "small:strict", *SHORT, *seeds)
    assert read("a").methods["trained anew"].metrics["val_loss"].seeds.shape == (1,)
    assert len(json.loads((here / "a/hyperparams.json").read_text())["seeds"]) == 2


def test_two_interrupts_before_the_first_episode_leave_nothing(gradhpo, here, monkeypatch, ctrl_c):
    monkeypatch.setattr(gh.driver.run, "_prepare", lambda *a: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(gh.driver.run, "look", lambda *a: None)

    def twice(*arguments):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(gh.driver.run, "_prepare", twice)
    status, out, err = gradhpo("tune", "small:strict", *SHORT, "--out", "a")
    assert (status, out, err) == (130, "", "gradhpo: interrupted\n")


def test_a_task_whose_episodes_bring_their_batches(gradhpo, here):
    (here / "line.py").write_text(BEGINS)
    status, _, err = gradhpo("tune", "line:task", "--episodes", "3", "--out", "a")
    assert status == 0
    assert read("a").methods["untuned"].gradient_evaluations == 3 * 7
    pytest.importorskip("optuna")
    arguments = ("--method", "one_step", "random", "--budget", "150", "--episodes", "3")
    assert gradhpo("compare", "line:task", *arguments, "--out", "b")[0] == 0
    costs = [(m.gradient_evaluations, m.second_order_products) for m in read("b").methods.values()]
    assert costs == [(2 * 21, 21), (7 * 21, 0)]


BEGINS = """
import jax
import numpy as np
import optax

from gradhpo import BilevelProblem, Start, Task, Window, from_optax


def loss(w, lam, batch):
    return (w * batch[0] - batch[1]) ** 2 + lam * w**2


def begin(params, lam, key):
    x = jax.random.normal(key, (7,))
    return Start(params, Window((x, 3 * x), (x, 3 * x)))


task = Task(BilevelProblem(from_optax(loss, optax.sgd(0.05)), loss, begin=begin), 0.0, 0.1)
"""


def test_seeds_are_draws_of_their_own(here):
    """Of seed 0 those of a plain run; the same for all trainings of a seed."""
    (here / "line.py").write_text(BEGINS)
    task, length, outer = load_task("line:task"), Length(3, 7), optax.sgd(0.0)
    method = method_of(chosen("one_step"), 7)
    losses = {
        seed: [
            trial.history.metrics["val_loss"].tolist()
            for trial in (
                trained(task, method, outer, length, seed=seed),
                left_alone(task, length, seed=seed),
            )
        ]
        for seed in (0, 1)
    }
    plain = History(task)
    gh.tune(task, gh.one_step(), outer, episodes=3, callback=plain)
    np.testing.assert_allclose(losses[0], [plain.metrics["val_loss"]] * 2, rtol=1e-6)
    np.testing.assert_allclose(*losses[1], rtol=1e-6)
    assert not set(losses[0][0]) & set(losses[1][0])


def test_sources_that_go_on_are_no_equal_trainings(gradhpo, here):
    rewritten(
        here, fixed=("fixed = task()", "fixed = task().replace(train=lambda: np.ones((5, 3)))")
    )
    status, _, err = gradhpo("tune", "small:fixed", *SHORT, "--out", "a")
    assert status == 1 and "train source is a function, which goes on" in err
    assert gradhpo("tune", "small:fixed", *SHORT, "--out", "a", "--alone")[0] == 0


@pytest.mark.parametrize("name", ["optimizer.py", "report.html", "seed0.jsonl"])
def test_files_of_others_are_left_alone(gradhpo, here, name):
    (here / "own").mkdir()
    (here / "own" / name).write_text("mine")
    status, _, err = gradhpo("tune", "small:strict", *SHORT, "--out", "own")
    assert status == 1 and f"holds results already ({name})" in err
    assert (here / "own" / name).read_text() == "mine"


def test_nothing_of_an_earlier_run_stays(gradhpo, here):
    pytest.importorskip("optuna")
    gradhpo(
        "tune", "small:strict", *SHORT, "--out", "a", "--seeds", "2", "--tensorboard", "--alone"
    )
    arguments = ("--overwrite", "--method", "random", "--trials", "2", "--alone")
    assert gradhpo("tune", "small:strict", *SHORT, "--out", "a", *arguments)[0] == 0
    assert not (here / "a/seed1.csv").exists() and not (here / "a/hypergradient.png").exists()
    assert not list((here / "a").glob("tensorboard/*/*"))


def test_a_natural_scale_that_is_not_finite_is_written_as_null(gradhpo, here):
    nan = (
        "test=data[:7],",
        'test=data[:7], natural=lambda lam: {"log": jnp.log(lam["rate"] - 1)},',
    )
    rewritten(here, nan=nan)
    assert gradhpo("tune", "small:strict", *SHORT, "--out", "a")[0] == 0
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert found["to"] == {"log": None} and found["values"]["rate"] > 0


@pytest.mark.parametrize("text", ["{", "[]", '{"seeds": 1, "best_seed": 0}', "null"])
def test_a_file_of_another_kind(here, text):
    (here / "hyperparams.json").write_text(text)
    with pytest.raises(ValueError, match="hyperparams.json"):
        load_hyperparams(here, {"rate": 1.0})


@pytest.mark.parametrize("value", [None, "fast", [1, 2]])
def test_values_that_are_no_numbers(here, value):
    content = {"best_seed": 0, "seeds": {"0": {"values": {"rate": value}}}}
    (here / "hyperparams.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leaf 'rate' of .*hyperparams.json"):
        load_hyperparams(here, {"rate": 1.0})


def test_a_simplex_by_projection_takes_another_optimizer(gradhpo, here):
    simplex = (
        "space=spaces.log(),",
        'space={"decay": None, "rate": spaces.log(), "of": spaces.simplex(by="projection")},',
    )
    rewritten(here, simplex=simplex, of_three=OF_THREE, mixed=MIXED)
    status, _, err = gradhpo("tune", "small:strict", *SHORT, "--out", "a")
    assert status == 1 and "optax.sgd" in err
    assert gradhpo("tune", "small:strict", *SHORT, "--outer", "sgd", "--out", "b")[0] == 0
    values = json.loads((here / "b/hyperparams.json").read_text())["seeds"]["0"]["values"]
    assert sum(values["of"]) == pytest.approx(1)


def test_a_function_that_makes_no_task(gradhpo):
    status, _, err = gradhpo("tune", "small:judge", "--out", "a")
    assert status == 1 and "small:judge takes w, lam, batch: a function that makes a task" in err


@pytest.mark.parametrize(
    "wrong",
    [["smal:strict"], ["small:strict", "--set", "no=1"], ["small:strict", "--method", "amigo"]],
)
def test_a_command_that_cannot_run_destroys_nothing(gradhpo, here, wrong):
    gradhpo("tune", "small:strict", *SHORT, "--out", "a", "--alone")
    (here / "a/seed_data.csv").write_text("mine")
    before = {path.name: path.read_bytes() for path in (here / "a").iterdir()}
    assert gradhpo("tune", *wrong, "--out", "a", "--overwrite")[0] in (1, 2)
    assert {path.name: path.read_bytes() for path in (here / "a").iterdir()} == before
    other = ("--method", "t1t2", "--out", "a", "--overwrite")
    assert gradhpo("compare", "small:strict", *SHORT[:4], *other)[0] == 0
    assert sorted(os.listdir("a")) == ["compare.png", "curves.csv", "result.json", "seed_data.csv"]


def test_an_error_of_the_data_costs_no_episode_and_no_trial(gradhpo, here):
    """The source fails in the seventh episode; a search by then has trained once."""
    rewritten(here, source=("train=gh.Resident(data[:examples], 5, seed=seed)", "train=Ends(data)"))
    text = (here / "small.py").read_text().replace("fixed = task()", "")
    (here / "small.py").write_text(text + ENDS)
    arguments = ("--episodes", "5", "--steps", "5", "--out", "a")
    with pytest.raises(OSError, match="gone"):
        cli_main("tune", "small:strict", "--episodes", "9", "--steps", "5", "--out", "b")
    found = json.loads((here / "b/hyperparams.json").read_text())["seeds"]["0"]
    assert (found["episodes"], found["ended"]) == (6, "failed")
    pytest.importorskip("optuna")
    with pytest.raises(OSError, match="gone"):
        sys.modules["small"].Ends.left = 40
        cli_main("tune", "small:strict", *arguments, "--method", "random", "--trials", "3")
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert (found["episodes"], found["ended"]) == (5, "failed")


def cli_main(*arguments):
    """With the error itself, not its line."""
    os.environ["GRADHPO_TRACEBACK"] = "1"
    try:
        return gh_cli.main(list(arguments))
    finally:
        del os.environ["GRADHPO_TRACEBACK"]


ENDS = """

class Ends:
    left = 30

    def __init__(self, data):
        self.data = data

    def __call__(self):
        type(self).left -= 1
        if self.left < 0:
            raise OSError("gone")
        return self.data[:5]
"""
