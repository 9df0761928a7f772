"""1, 14, 15: what ends a run from outside loses nothing that was saved."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from facade_cases import KINDS, METHODS, Source, T, method, run, start

from gradhpo import Resident, checkpoint
from gradhpo.checkpoint import CheckpointMismatch, Checkpoints
from gradhpo.driver.hooks import Progress
from gradhpo.driver.identity import digest_of
from gradhpo.solvers import cg

HERE = Path(__file__).parent
DATA = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
RESIDENT = {
    "get_train_batch": Resident(DATA, 3, seed=1),
    "get_val_batch": Resident(DATA, 3, seed=2),
}
ALL = {"M": 4, "of": 4}


class Cut(Exception):
    pass


def each(directory):
    return Checkpoints(directory=directory, seconds=0)


def cut_after(episodes):
    def callback(episode, state):
        if episode == episodes:
            raise Cut

    return callback


def functions():
    return {"get_train_batch": Source(1), "get_val_batch": Source(2)}


@pytest.mark.parametrize("name", KINDS)
def test_01_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, name):
    goes_on(tmp_path, method(name), start(name=name), lambda: RESIDENT)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("loop", ["scan", "host"])
@pytest.mark.parametrize("name", METHODS)
def test_01_so_does_every_method_in_every_kind_of_loop(tmp_path, name, loop):
    short = {"solver": cg(max_iterations=4)} if name == "implicit_cg" else {}  # written out on host
    goes_on(tmp_path, method(name, loop=loop, **short), start(name=name), functions)


def goes_on(tmp_path, opt, begun, sources):
    state = opt.init(*begun)
    whole = run(opt, state, **ALL, **sources())
    with pytest.raises(Cut):
        run(opt, state, **ALL, callback=cut_after(3), checkpoint=each(tmp_path), **sources())
    assert len(checkpoint.steps(tmp_path)) == 2  # an episode counts once its hooks have seen it
    again = run(opt, state, **ALL, checkpoint=tmp_path, **sources())
    assert digest_of(again) == digest_of(whole)
    assert int(again.episode) == 4
    # A run that has ended ends at once, and gives the same.
    assert digest_of(run(opt, state, **ALL, checkpoint=tmp_path, **sources())) == digest_of(whole)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["hyperdistill", "reverse", "saba", "reversible"])
def test_01_killed_at_random_moments(name):
    """Three kills of each; docs/reliability.md tells of the two hundred."""
    command = [sys.executable, HERE / "killing.py", name, "--kills", "3"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{name}: " in found.stdout and "differs" not in found.stdout


def test_18_other_data_are_refused(tmp_path):
    """One number of one example; tests/driver/test_checkpoints.py has more that may differ."""
    opt = method("one_step")
    state = opt.init(*start())
    run(opt, state, M=1, of=4, checkpoint=tmp_path, **RESIDENT)
    other = DATA.copy()
    other[7, 1] += 1
    changed = RESIDENT | {"get_val_batch": Resident(other, 3, seed=2)}
    with pytest.raises(CheckpointMismatch, match=r"val data.sha256: \w+ -> \w+"):
        run(opt, state, **ALL, checkpoint=tmp_path, **changed)


@pytest.fixture
def default_handlers():
    """Those of a program; pytest has one of its own for Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    term = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, term)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_14_15_the_first_signal_finishes_the_episode_and_saves(tmp_path, default_handlers, number):
    opt = method("one_step")
    state, seen = opt.init(*start()), []

    def callback(episode, state):
        seen.append(episode)
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt) as raised:
        run(opt, state, **ALL, callback=callback, checkpoint=tmp_path, **RESIDENT)
    assert seen == [1] and checkpoint.steps(tmp_path) == [T]
    if number == signal.SIGTERM:
        assert isinstance(raised.value, SystemExit) and raised.value.code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    again = run(opt, state, **ALL, checkpoint=tmp_path, **RESIDENT)
    assert digest_of(again) == digest_of(run(opt, state, **ALL, **RESIDENT))


def test_14_the_second_signal_stops_at_once(tmp_path, default_handlers):
    opt = method("one_step")
    state = opt.init(*start())

    class Twice(Source):
        def __call__(self):
            if self.calls == T + 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("not stopped")
            return super().__call__()

    sources = {"get_train_batch": Twice(1), "get_val_batch": Source(2)}
    with pytest.raises(SystemExit):
        run(opt, state, **ALL, checkpoint=each(tmp_path), **sources)
    assert checkpoint.steps(tmp_path) == [T]
    again = run(opt, state, **ALL, checkpoint=tmp_path, **functions())
    assert digest_of(again) == digest_of(run(opt, state, **ALL, **functions()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_14_15_a_signal_that_comes_as_a_run_ends_is_heard(
    tmp_path, default_handlers, monkeypatch, number
):
    real = Progress.close

    def close(line):
        os.kill(os.getpid(), number)
        real(line)

    monkeypatch.setattr(Progress, "close", close)
    opt = method("one_step")
    with pytest.raises(KeyboardInterrupt) as raised:
        run(opt, opt.init(*start()), **ALL, checkpoint=tmp_path, **RESIDENT)
    assert int(raised.value.state.episode) == ALL["M"]
    assert checkpoint.steps(tmp_path)[-1] == ALL["M"] * T
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_14_15_a_signal_is_heard_where_the_episode_ends_in_an_error(tmp_path, default_handlers):
    def callback(episode, state):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("of the callback")

    opt = method("one_step")
    with pytest.raises(SystemExit) as raised:
        run(opt, opt.init(*start()), **ALL, callback=callback, checkpoint=tmp_path, **RESIDENT)
    assert isinstance(raised.value.__cause__, ValueError) and raised.value.code == 143
    assert "of the callback" in str(raised.value.__notes__)


def test_15_without_a_directory_sigterm_is_not_touched(default_handlers):
    """It ends the process at once, as ever: there is nothing to save."""
    opt, seen = method("one_step"), []
    look = lambda episode, state: seen.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    run(opt, opt.init(*start()), M=1, callback=look, **RESIDENT)
    assert seen == [signal.SIG_DFL]


def test_14_no_handler_outside_of_the_main_thread(tmp_path, default_handlers):
    opt, seen = method("one_step"), []

    def look(episode, state):
        seen.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))

    arguments = {"M": 1, "callback": look, "checkpoint": tmp_path, **RESIDENT}
    thread = threading.Thread(target=run, args=(opt, opt.init(*start())), kwargs=arguments)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, signal.SIG_DFL]
    assert checkpoint.steps(tmp_path) == [T]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import conftest
from facade_cases import Source, method, run, start
opt = method("one_step")
print("begun", flush=True)
report = lambda episode, state: print(episode, flush=True)
run(opt, opt.init(*start()), M=10**6, of=10**6, callback=report, checkpoint={directory!r})
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number, status", [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_14_15_a_script_ends_with_the_status_of_the_signal(tmp_path, number, status):
    """-2: the process has died of SIGINT, which a shell calls 130."""
    paths = [str(HERE.parent), str(HERE.parent / "algorithms")]
    script = SCRIPT.format(paths=paths, directory=str(tmp_path))
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.stdout.readline() != "3\n":
            pass
        child.send_signal(number)
        printed = child.stdout.read().split()  # `communicate` would lose what `readline` read ahead
    assert child.returncode == status
    assert checkpoint.steps(tmp_path) == [T * int(printed[-1] if printed else 3)]
