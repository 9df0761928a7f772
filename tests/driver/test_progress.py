"""What a run says on a terminal: the progress line, and "compiling ..." where that takes long."""

import io
import time

import jax.numpy as jnp
import numpy as np
import pytest
from facade_cases import method, run, start

from gradhpo import BilevelProblem, InOrder, Task, from_update, one_step, spaces, tune
from gradhpo.driver.hooks import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[Terminal, io.StringIO], ids=["terminal", "file"])
def replaced(request, monkeypatch):
    """`replaced() -> stderr`, for use in the test itself: between set-up and call pytest puts its
    own there."""

    def replace():
        monkeypatch.setattr("sys.stderr", made := request.param())
        return made

    return replace


@pytest.mark.parametrize("progress", [None, True, False])
def test_a_terminal_shows_a_line_unless_told_otherwise(replaced, progress):
    stderr, opt = replaced(), method("one_step")
    run(opt, opt.init(*start()), M=3, progress=progress)
    shown = stderr.isatty() if progress is None else progress
    assert ("3/3" in stderr.getvalue() and "val_loss=" in stderr.getvalue()) == shown
    assert bool(stderr.getvalue()) == shown


def test_the_line_has_hyperparameters_in_natural_scale(replaced):
    problem = BilevelProblem(
        from_update(lambda w, lam, batch: w - lam["rate"] * (w - batch)),
        lambda w, lam, batch: w**2 * jnp.sum(lam["mix"]),
    )
    task = Task(
        problem,
        2.0,
        {"mix": np.array([0.25, 0.75]), "rate": 0.5},
        InOrder(jnp.ones(4)),
        InOrder(jnp.zeros(4)),
        space={"mix": spaces.simplex(), "rate": spaces.log()},
    )
    stderr = replaced()
    tune(task, one_step(), episodes=1, T=4, lr_hyper=0.0, progress=True)
    said = "lam/rate=0.5 lam/mix/min=0.25 lam/mix/max=0.75"
    assert said in stderr.getvalue() or said[:12] in stderr.getvalue()  # a bar cuts off the rest


def test_a_second_run_counts_its_own_episodes(replaced):
    stderr, opt = replaced(), method("one_step")
    state = run(opt, opt.init(*start()), M=2, progress=False)
    run(opt, state, M=3, progress=True)
    assert "3/3" in stderr.getvalue() and "5/" not in stderr.getvalue()


def test_a_long_compilation_is_mentioned_and_a_short_one_is_not(replaced, monkeypatch):
    monkeypatch.setattr(Progress, "PATIENCE", 0.05)
    stderr = replaced()
    line = Progress(3, 0, None)
    with line.compiling():
        time.sleep(0.5 if stderr.isatty() else 0.1)
    assert stderr.getvalue().count("compiling ...\n") == int(stderr.isatty())
    with line.compiling():
        pass
    time.sleep(0.1)
    assert stderr.getvalue().count("compiling") == int(stderr.isatty())
    line.close()


def test_a_run_mentions_its_compilation(replaced, monkeypatch):
    monkeypatch.setattr(Progress, "PATIENCE", 0.0)
    stderr, opt = replaced(), method("one_step")
    run(opt, opt.init(*start()), M=3)
    assert stderr.getvalue().count("compiling ...") == int(stderr.isatty())  # once a run
