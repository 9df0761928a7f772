"""Faults 8, 23 and 24, and the disk under logs and results: what the machine does to a run."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import BilevelProblem, Resident, Task, cli, from_optax, one_step, tune
from gradhpo.driver import _memory
from gradhpo.report import StudyResult, output_directory, read, summarize, write
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MultiLogger,
    ProgressLogger,
    TensorBoardLogger,
)

DATA = np.random.default_rng(0).normal(2.0, 1.0, (20, 3)).astype(np.float32)


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


PROBLEM, METHOD = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge), one_step()


def run(episodes=3, **options):
    source = Resident(DATA, 5)
    task = Task(PROBLEM, np.zeros(3, np.float32), jnp.float32(0.1), source, source)
    return tune(task, METHOD, episodes=episodes, T=2, lr_hyper=0.1, **options)


FULL = Path("/dev/full")  # where every write fails as on a full disk


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("kind", [CSVLogger, JSONLinesLogger])
def test_08_a_full_disk_under_a_log_costs_no_episode(kind):
    with kind(FULL) as logger:
        with pytest.warns(RuntimeWarning, match="cannot log to /dev/full") as told:
            state = run(logger=logger)
        assert len(told) == 1 and int(state.episode) == 3
        assert [record["step"] for record in logger.records] == [2, 4, 6]


def test_08_a_reader_that_has_left_costs_no_episode(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with JSONLinesLogger(pipe) as logger:
        os.close(reader)
        with pytest.warns(RuntimeWarning, match="Broken pipe"):
            state = run(logger=logger)
    assert int(state.episode) == 3 and len(logger.records) == 3


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MB with room for 20 kB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    (place / "others").write_bytes(bytes((1 << 20) - (20 << 10)))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_08_a_disk_that_fills_up_loses_no_whole_line_and_no_earlier_result(full_disk):
    result = StudyResult("toy", {}, summarize({"a": {"val_loss": [1.0]}}), 0.1)
    write(result, full_disk)
    with CSVLogger(full_disk / "log.csv") as logger:
        with pytest.warns(RuntimeWarning, match="No space left"):
            for step in range(5000):
                logger.log({"val_loss": 0.12345678}, step)  # not 16 bytes, a part of a page
        *lines, last = (full_disk / "log.csv").read_text().split("\n")
    assert last == "" and len(lines) - 1 + len(logger.records) == 5000
    large = StudyResult("toy", {"x": "x" * 30_000}, result.methods, 0.1)
    with pytest.raises(OSError, match="No space left") as error:
        write(large, full_disk)
    assert str(full_disk / "result.json") in str(error.value)
    assert read(full_disk).settings == {} and not list(full_disk.glob(".*"))
    with pytest.raises(OSError, match="cannot write .* 16 MB to spare"):
        output_directory(full_disk / "out")


def test_08_a_directory_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"cannot write to .*a: Permission denied.*--out"):
        output_directory(tmp_path / "a")


@pytest.mark.parametrize("name", ["a b", "ü 漢字 ñ", "-x", "a.b/c d"])
def test_08_spaces_and_letters_of_all_alphabets_are_in_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = output_directory(name)
    assert out == tmp_path / name
    write(StudyResult("toy", {}, {}, 0.1), out)
    with JSONLinesLogger(Path(name, "log.jsonl")) as logger:
        monkeypatch.chdir("/")
        run(episodes=1, logger=logger)
    assert len(logger.path.read_text().splitlines()) == 1 and logger.path.parent == out


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_08_a_file_in_the_place_of_the_directory_is_refused(path, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert cli.main(["run", "tutorial", "--out", path]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("gradhpo: error: the output path") and shown.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_23_no_duration_is_taken_from_a_clock_that_can_be_set():
    """`time.time` is an hour off when a clock is set; a stamp for TensorBoard needs it, and the
    line that says since when a directory is held."""
    source = Path(gradhpo.__file__).parent
    used = {
        path.name
        for path in source.rglob("*.py")
        if "time.time(" in (text := path.read_text("utf-8")) or "datetime" in text
    }
    assert used <= {"_tensorboard.py", "lock.py"}


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_23_a_clock_that_jumps_disturbs_neither_logs_nor_progress(
    jump, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorboardX")
    before, calls = time.time(), []

    def jumping():
        calls.append(None)
        return before + jump * len(calls)

    monkeypatch.setattr(time, "time", jumping)
    log = JSONLinesLogger(tmp_path / "log.jsonl")
    with MultiLogger(log, ProgressLogger(every=100.0), TensorBoardLogger(tmp_path)) as logger:
        run(logger=logger, progress=False)
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert capsys.readouterr().err.count("\n") == 2  # the first record, and the last one
    assert calls  # the stamps of TensorBoard


OUT_OF_MEMORY = """
import resource
import jax.numpy as jnp, numpy as np, optax
import gradhpo as gh

train = lambda w, lam, batch: jnp.sum((w - batch) ** 2) + lam * jnp.sum(w**2)
judge = lambda w, lam, batch: jnp.sum((w - batch) ** 2)
problem = gh.BilevelProblem(gh.from_optax(train, optax.sgd(0.01)), judge)
source = lambda: np.float32(1.0)
task = gh.Task(problem, jnp.zeros(1_000_000), jnp.float32(0.1), source, source)
state = gh.tune(task, gh.reverse(2), episodes=1, T=2, lr_hyper=0.0)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
try:
    gh.tune(task, gh.reverse(2000), episodes=2, T=2000, lr_hyper=0.0, state=state)
except MemoryError as error:
    print(error)
    state = error.state
state = gh.tune(task, gh.reverse(2), episodes=1, T=2, lr_hyper=0.0, state=state)
print("went on to episode", int(state.episode))
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no limit of memory here")
def test_24_a_long_unroll_without_memory_says_bytes_and_remedies_and_the_process_goes_on():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, end = done.stdout.splitlines()
    for part in ("at a request for 8.0 GB of", "that may be had", "one takes 4.0 MB",
                 "T=2000 steps 8.0 GB", 'memory="segments"', "shorter T", "one_step"):  # fmt: skip
        assert part in message
    assert end == "went on to episode 2"


class OfNumPy(MemoryError):
    """NumPy raises a class of its own; a plain MemoryError is Python's, or the user's."""


@pytest.mark.parametrize(
    "error, seen",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes."),
         "a request for 4.0 kB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate "
                                    "12.5GiB."), "a request for 12.5GiB"),
        (OfNumPy("Unable to allocate 37.3 GiB for an array"), "a request for 37.3 GiB"),
        (OfNumPy(), "out of memory of "),
    ],
)  # fmt: skip
def test_24_every_kind_of_exhaustion_is_explained(error, seen):
    state = run(episodes=1)
    with pytest.raises(MemoryError, match=seen) as explained:
        with _memory.memory_explained("reverse", state, 10):
            raise error
    assert explained.value.__cause__ is error and "T=10 steps 120 bytes" in str(explained.value)


def test_24_an_episode_without_memory_hands_back_the_state_before_it():
    def exhausted(episode, state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with pytest.raises(MemoryError, match="tune: out of memory") as error:
        run(callback=exhausted)
    assert int(error.value.state.episode) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):  # other errors stay
        with _memory.memory_explained("reverse", error.value.state, 10):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
