"""One writer for a directory. A holder that is known to have ended is passed over; its age alone
says nothing."""

import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoint_cases import tree

from gradhpo import checkpoint
from gradhpo.checkpoint import DirectoryBusy, lock
from gradhpo.checkpoint.lock import only_writer

HOLDER = """
import sys, time
sys.path.insert(0, {here!r})
from checkpoint_cases import tree
from gradhpo import checkpoint
with checkpoint.writing(sys.argv[1]) as writer:
    writer.save(tree(20), step=20)
    writer.wait()
    print("holding", flush=True)
    time.sleep(600)
"""


def holder(directory):
    """Another process that writes there."""
    code = HOLDER.format(here=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    return process


@pytest.mark.slow
@pytest.mark.faults
def test_10_11_second_process_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    process = holder(tmp_path)
    try:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(DirectoryBusy) as error, checkpoint.writing(tmp_path):
            pass
        since = json.loads((tmp_path / ".gradhpo.holder").read_text())["since"]
        for part in (f"process {process.pid} on {platform.node()}", str(tmp_path), since):
            assert part in str(error.value)
        assert "remove" not in str(error.value)  # which would not help: the process lives
        with pytest.raises(DirectoryBusy), checkpoint.writing(tmp_path, takeover=True):
            pass
        assert checkpoint.steps(tmp_path) == [20]  # reading is free
        assert sorted(tmp_path.iterdir()) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (tmp_path / ".gradhpo.holder").exists()
    with checkpoint.writing(tmp_path) as writer:
        writer.save(tree(40), step=40)
    assert checkpoint.steps(tmp_path) == [20, 40]


def test_10_second_writer_in_one_process_is_refused(tmp_path):
    with checkpoint.writing(tmp_path) as writer:
        with pytest.raises(DirectoryBusy, match=f"process {os.getpid()} on"):
            checkpoint.save(tmp_path, tree(1), step=1)
        writer.save(tree(2), step=2)
    checkpoint.save(tmp_path, tree(3), step=3)  # and it is free afterwards
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert not list(tmp_path.glob(".gradhpo*"))


def alive():
    """What this machine says of a process that has begun and is there: the parent."""
    pid = os.getppid()
    return lock._me() | {"pid": pid, "started": lock._start_of(pid)}


def enter(directory, content, **settings):
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / ".gradhpo.holder").write_text(text)
    with only_writer(directory, **settings):
        return json.loads((directory / ".gradhpo.holder").read_text())["pid"] == os.getpid()


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize(
    "change",
    [
        {"pid": 2**22 + 1},  # ended, and above the numbers that there are
        {"started": 1},  # its number has been given to another process since
        {"boot": "before", "started": None},  # this machine has been started since
        {"host": "a-container"},  # of this machine: the lock that was free reaches it
        {"pid": None},
        {"pid": "1; rm"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_11_holder_that_has_ended_is_no_obstacle(tmp_path, change):
    assert enter(tmp_path, alive() | change)


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "null", "\x00" * 50, "[" * 4000, '{"pid": 1}'[:-1], "x" * 10**6]
)
def test_11_holder_file_that_is_damaged_is_no_obstacle(tmp_path, damaged):
    assert enter(tmp_path, damaged)


@linux
def test_11_holder_that_lives_is_respected_even_if_its_lock_was_removed(tmp_path):
    with pytest.raises(DirectoryBusy, match=f"process {os.getppid()} on .*takeover=True"):
        enter(tmp_path, alive())


def test_11_holder_on_another_machine_is_taken_over_only_if_told(tmp_path):
    foreign = alive() | {"host": "elsewhere", "boot": "another", "since": "2001-01-01T00:00:00"}
    with pytest.raises(DirectoryBusy, match="on elsewhere .* since 2001.*remove .*gradhpo.holder"):
        enter(tmp_path, foreign)  # whatever its age
    assert json.loads((tmp_path / ".gradhpo.holder").read_text()) == foreign
    with checkpoint.writing(tmp_path, takeover=True) as writer:
        writer.save(tree(1), step=1)


def test_11_who_was_taken_over_removes_nothing_of_the_successor(tmp_path):
    """Where the lock does not reach: as if it had been removed by hand."""
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(only_writer(tmp_path))
        (tmp_path / ".gradhpo.lock").unlink()
        foreign = json.loads((tmp_path / ".gradhpo.holder").read_text()) | {"host": "elsewhere"}
        second.enter_context(only_writer(tmp_path, takeover=True))
        (tmp_path / ".gradhpo.holder").write_text(json.dumps(foreign))
        first.close()
        with pytest.raises(DirectoryBusy), only_writer(tmp_path):
            pass


def test_65_links_in_place_of_the_lock_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".gradhpo.holder").symlink_to(outside)
    with only_writer(directory):
        assert not (directory / ".gradhpo.holder").is_symlink()
    (directory / ".gradhpo.lock").symlink_to(outside)
    with pytest.raises(OSError, match=r"cannot lock .*gradhpo\.lock"), only_writer(directory):
        pass
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("what", ["mkdir", "mkfifo"])
def test_65_holder_that_is_no_file_is_not_read(tmp_path, what):
    """Reading a pipe would wait for ever."""
    getattr(os, what)(tmp_path / ".gradhpo.holder")
    if what == "mkdir":
        with pytest.raises(OSError), only_writer(tmp_path):
            pass
    else:
        with only_writer(tmp_path):
            pass


def test_11_directory_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoint.writing(tmp_path):
        _ = 1 / 0
    with checkpoint.writing(tmp_path):
        pass
