"""How a command line names a task, and what it sets."""

import numpy as np
import pytest

from gradhpo.tuning import load_task
from gradhpo.tuning.target import load, setting


def test_a_function_gets_the_seed_and_its_arguments(here):
    target = load("small:task", ["examples=30", "rate=0.2"])
    first, other = target.make(0), target.make(1)
    assert target.seeded and first.train.length == 30
    assert first.hyperparams["rate"] == np.float32(0.05)  # **unused took it
    assert not np.array_equal(first.train.data, other.train.data)
    assert first.problem is other.problem


def test_what_is_no_argument_is_where_a_hyperparameter_starts(here):
    task = load_task("small:strict", ["rate=3e-3", "examples=10"], seed=2)
    assert task.hyperparams["rate"] == np.float32(3e-3) and task.hyperparams["decay"] == 1
    assert task.hyperparams["rate"].dtype == np.float32 and task.train.length == 10


def test_a_task_by_itself_is_the_same_for_every_seed(here):
    target = load("small:fixed", ["rate=1"])
    assert not target.seeded and target.make(0) is target.make(1)
    assert target.make(0).hyperparams["rate"] == 1


def test_a_seed_that_is_set_is_not_counted(here):
    target = load("small:strict", ["seed=3"])
    assert not target.seeded
    same = load_task("small:strict", seed=3)
    np.testing.assert_array_equal(target.make(0).train.data, same.train.data)


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("small", ValueError, "named MODULE:NAME"),
        ("small:", ValueError, "named MODULE:NAME"),
        (":task", ValueError, "named MODULE:NAME"),
        ("small.py:task", ValueError, "in an import, small:task"),
        ("a/small.py:task", ValueError, r"in an import, a\.small:task"),
        ("absent:task", ModuleNotFoundError, "no module 'absent'"),
        ("small:absent", ValueError, "has no 'absent'.*fixed, loss, judge, task"),
        ("small:PROBLEM", ValueError, "it is BilevelProblem"),
        ("small:nothing", TypeError, "must return a gradhpo.Task, but returned int"),
    ],
)
def test_names_of_no_task(here, name, error, message):
    with pytest.raises(error, match=message):
        load_task(name)


@pytest.mark.parametrize(
    "word, message",
    [
        ("rate", "is NAME=VALUE, not 'rate'"),
        ("=3", "is NAME=VALUE"),
        ("lr=1", "takes seed, examples; its hyperparameters are decay, rate"),
        ("rate=fast", "rate='fast': a hyperparameter starts at a number"),
        ("rate=True", "a hyperparameter starts at a number"),
        ("rate=-1", r"leaf \['rate'\].*is not above 0"),
    ],
)
def test_settings_without_a_place(here, word, message):
    with pytest.raises(ValueError, match=message):
        load_task("small:strict", [word])


def test_a_mistake_in_the_module_is_its_own(here):
    (here / "broken.py").write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there_at_all'"):
        load_task("broken:task")


def test_values_are_literals_or_text():
    assert setting("a=[1, 2]") == ("a", [1, 2])
    assert setting("a=x=y") == ("a", "x=y")
