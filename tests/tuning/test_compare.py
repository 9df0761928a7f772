"""Methods for the same number of gradients: what is counted, and where each training begins."""

import os
from itertools import pairwise

import jax
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo.report import read, table
from gradhpo.tuning import compare, load_task
from gradhpo.tuning.methods import chosen, method_of
from gradhpo.tuning.sequences import by_hypergradients, by_search
from gradhpo.tuning.target import load
from gradhpo.tuning.training import Length

LENGTH = Length(episodes=2, steps=5)


@pytest.fixture
def make(here):
    return load("small:strict").make


def test_hyperparameters_go_on_from_training_to_training_and_weights_do_not(make):
    outer = optax.adam(0.1)
    done = list(by_hypergradients(make, chosen("one_step"), outer, LENGTH, budget=130))
    assert [each.spent for each in done] == [40, 80, 120]  # 2 G + M a step, M counting as two
    starts = [each.trial.history.hyperparams for each in done]
    for before, after in pairwise(starts):
        assert after["rate"][0] == before["rate"][-1] != before["rate"][0]
    # written out, with one optimizer of the hyperparameters for all trainings
    task = make(0)
    lam, slots = task.stored.hyperparams, outer.init(task.stored.hyperparams)
    for each in done:
        inner = task.begin(1)[0]
        for episode in range(2):
            inner = inner._replace(
                opt_state=task.stored.problem.dynamics.init(inner.params, lam)[1]
            )
            train = task.train.data[task.train.indices(5 * episode, 5)]
            val = task.val.data[task.val.indices(5 * episode, 5)]
            for t in range(5):
                window = gh.Window(train[t : t + 1], val[t : t + 1])
                got = gh.one_step().estimate(task.stored.problem, (), inner, lam, window)
                updates, slots = outer.update(got.hypergrad, slots, lam)
                lam, inner = optax.apply_updates(lam, updates), got.inner
        np.testing.assert_allclose(each.trial.state.params, inner.params, rtol=1e-5)
        np.testing.assert_allclose(each.trial.hyperparams["rate"], np.exp(lam["rate"]), rtol=1e-5)


def test_a_method_is_one_object_so_that_seeds_share_its_programs():
    """Bound methods of two equal optimizers are not equal."""
    words = ("reverse", "hyperdistill:gamma=0.9")
    first, again = ([method_of(chosen(word), 5) for word in words] for _ in range(2))
    assert first == again and first[0] != method_of(chosen("reverse"), 6)


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes"])
def test_a_search_begins_at_the_start_and_stays_in_its_box(make, name):
    pytest.importorskip("optuna")
    done = by_search(make, name, LENGTH, trials=30, seed=3, width=0.5)
    rates = np.log([each.trial.hyperparams["rate"] for each in done])
    assert rates[0] == pytest.approx(np.log(0.05)) and len(set(rates)) == 30
    assert np.abs(rates - rates[0]).max() < 0.5 + 1e-5
    assert [each.spent for each in done] == [10 * i for i in range(1, 31)]
    again = by_search(make, name, LENGTH, trials=30, seed=3, width=0.5)
    assert [each.judged for each in done] == [each.judged for each in again]


def test_what_counts_is_the_lowest_so_far(make):
    pytest.importorskip("optuna")
    told = []
    methods = ["one_step:outer_rate=0.1", "random"]
    result = compare(make, methods, 400, episodes=2, steps=5, seeds=2, progress=told.append)
    assert len(told) == 4 and "(40 trainings)" in told[1]
    done = by_search(make, "random", LENGTH, trials=40, seed=1)
    losses = [each.judged["val_loss"] for each in done]
    random = result.methods["random"]
    assert random.metrics["val_loss"].seeds[1] == pytest.approx(min(losses))
    curve = random.metrics["val_loss_by_epoch"].seeds[1]
    np.testing.assert_allclose(curve, np.minimum.accumulate(losses))  # one training for each part
    best = done[int(np.argmin(losses))]
    assert random.metrics["test_loss"].seeds[1] == pytest.approx(best.judged["test_loss"])
    assert random.gradient_evaluations == 400
    first = result.methods[methods[0]]
    assert first.gradient_evaluations + 2 * first.second_order_products == 400
    # four parts of the budget pass before its first training has ended
    assert list(np.isnan(first.metrics["val_loss_by_epoch"].mean[:4])) == [True] * 3 + [False]
    assert "one_step:outer_rate=0.1" in table(result)


def test_discrete_and_projected_hyperparameters_are_drawn_within_their_spaces(make):
    pytest.importorskip("optuna")
    from gradhpo import spaces

    space = {"decay": spaces.integer(0, 2), "rate": spaces.interval(0.0, 0.06, by="projection")}
    changed = lambda seed: make(seed).replace(space=space)  # noqa: E731
    found = [each.trial.hyperparams for each in by_search(changed, "random", LENGTH, 30)]
    assert {float(each["decay"]) for each in found} == {0.0, 1.0, 2.0}
    assert all(0 <= each["rate"] <= np.float32(0.06) for each in found)


@pytest.mark.parametrize(
    "methods, budget, message",
    [
        (["reverse"], 10, "one training by reverse takes 42 gradients, more than the budget of 10"),
        (["random"], 9, "one training by random takes 10 gradients"),
        (["random", "reverse"], 41, "one training by reverse takes 42 gradients"),
        (["sgd"], 100, "unknown method 'sgd'; known: fo, "),
        (["reverse:bar=1"], 100, "bar=1: the method reverse has the settings budget, memory"),
        ([], 100, "at least one method"),
        (["reverse"], -1, "budget"),
    ],
)
def test_what_cannot_be_compared(make, methods, budget, message):
    told = []
    with pytest.raises(ValueError, match=message):
        compare(make, methods, budget, episodes=2, steps=5, progress=told.append)
    assert not told  # nothing was trained for it


def test_on_the_command_line(gradhpo):
    arguments = ("--episodes", "2", "--steps", "5", "--seeds", "2", "--out", "a", "--budget", "80")
    status, out, err = gradhpo(
        "compare", "small:strict", "--method", "one_step", "drmad", *arguments
    )
    assert status == 0 and "seed 1, drmad" in err and "val_loss (lower is better)" in out
    assert sorted(os.listdir("a")) == ["compare.png", "curves.csv", "result.json"]
    result = read("a")
    assert list(result.methods) == ["one_step", "drmad"] and result.study == "small:strict"
    assert result.methods["drmad"].paired_difference["val_loss"].to == "one_step"
    status, _, err = gradhpo("compare", "small:fixed", *arguments)
    assert status == 1 and "make small:fixed a function that takes seed" in err


def test_a_task_whose_episodes_begin_anew(here):
    """MAML on a line: the hyperparameters are the start, episodes bring their batches."""
    from gradhpo import BilevelProblem, Start, Task, Window, from_optax

    def loss(w, lam, batch):
        return (w * batch[0] - batch[1]) ** 2

    def begin(params, lam, key):
        slope = 3 + 0.1 * jax.random.normal(key)
        x = np.ones(4, np.float32)
        return Start(lam, Window((x, slope * x), (x, slope * x)))

    problem = BilevelProblem(from_optax(loss, optax.sgd(0.05)), loss, begin=begin)
    task = Task(problem, np.float32(0), np.float32(0))
    result = compare(task, ["reverse:outer_rate=0.5"], 400, episodes=10, steps=4)
    losses = result.methods["reverse:outer_rate=0.5"].metrics["val_loss_by_epoch"].mean
    assert losses[-1] < 0.1
    assert load_task("small:strict").problem.begin is None


def test_seeds_that_are_done_are_kept(gradhpo, monkeypatch):
    from gradhpo.tuning import sequences

    train, calls = sequences.trained, []

    def late(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(sequences, "trained", late)
    arguments = ("--episodes", "2", "--steps", "5", "--seeds", "3", "--out", "a", "--budget", "45")
    status, *_ = gradhpo("compare", "small:strict", "--method", "one_step", "drmad", *arguments)
    assert status == 130
    methods = read("a").methods
    assert [m.metrics["val_loss"].seeds.shape for m in methods.values()] == [(1,), (1,)]


@pytest.mark.filterwarnings("ignore:.*updates")
@pytest.mark.parametrize("policy, status", [("stop", 0), ("raise", 1)])
def test_what_follows_a_rejected_update(gradhpo, policy, status):
    """A training that is stopped is the last of its method."""
    far = ("--episodes", "2", "--steps", "40", "--set", "rate=1e9", "--out", "a")
    methods = ("--method", "one_step", "--budget", "2000")
    got, out, err = gradhpo("compare", "small:strict", *far, *methods, "--on-failure", policy)
    assert got == status
    assert ("NONFINITE_TRAIN_STATE" in err) == (policy == "raise")  # "stop": a warning
    if policy == "stop":
        assert "one_step: " in err and "(1 trainings)" in err
