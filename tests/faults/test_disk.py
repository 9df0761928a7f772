"""Disks that are full or read-only, directories that are none, and saves that fail."""

import os
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import bits, template, tree

from gradhpo import GradhpoWarning, checkpoint
from gradhpo.checkpoint import CheckpointError, directory


@pytest.fixture
def small_disk(tmp_path):
    """3 MB, of which a checkpoint takes 1.2."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("no right to mount a disk here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def large(step):
    return {"w": np.random.default_rng(step).integers(0, 256, 1_200_000, np.uint8)}


def test_07_full_disk_leaves_the_checkpoints_there_are(small_disk, caplog):
    with checkpoint.writing(small_disk) as writer:
        for step in (1, 2):
            writer.save(large(step), step=step)
        writer.wait()
        before = sorted(str(path) for path in small_disk.rglob("*"))
        for step in (3, 4):
            writer.save(large(step), step=step)
            with pytest.raises(CheckpointError, match="(?i)cannot save step .*no space left"):
                writer.wait()
        assert sorted(str(path) for path in small_disk.rglob("*")) == before
        shutil.rmtree(small_disk / "step-0000000001")  # room again
        writer.save(large(5), step=5)
    assert checkpoint.steps(small_disk) == [2, 5]
    assert not caplog.records  # the one message is the error
    assert bits(checkpoint.restore(small_disk, large(0))) == bits(large(5))


@pytest.mark.parametrize("call", ["open", "fsync", "mkdir", "rename"])
def test_07_any_call_that_fails_leaves_the_checkpoints_there_are(run, monkeypatch, call):
    """Every single call of that kind that `publish` makes, in turn."""
    real, left = getattr(os, call), 0

    def failing(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    def write(path):
        (path / "file").write_text("x")
        (path / "folder").mkdir()

    before, failed = sorted(run.rglob("*")), 0
    monkeypatch.setattr(os, call, failing)
    for k in range(1, 20):
        left = k
        try:
            directory.publish(run, 60, write)
        except OSError:
            failed += 1
            left = 0
            if directory.numbers(run)[-1] == 60:  # published; its name may be lost with the power
                assert call == "fsync" or call == "open"
                shutil.rmtree(run / "step-0000000060")
            assert sorted(run.rglob("*")) == before
        else:
            break
    assert failed


@pytest.mark.parametrize("name", ["a b", "ünïcödé", "per%20cent", "q?x#y", "new\nline", "'\"$(x)"])
def test_09_odd_names_of_directories(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(name, {"w": jnp.arange(3.0)}, step=1)  # relative
    assert path == tmp_path / name / "step-0000000001"
    assert checkpoint.restore(name, {"w": jnp.zeros(3)})["w"][2] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["back\\slash", "caf\udce9", "gs://bucket/run", "nu\0ll"])
def test_09_names_that_mean_another_place_are_refused(tmp_path, name, monkeypatch):
    """For a backslash, Orbax writes its arrays into a directory beside that one."""
    if os.name == "nt":
        pytest.skip("a backslash is a separator")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match="hoose another|no directory of this machine"):
        checkpoint.save(name, {"w": jnp.arange(3.0)}, step=1)
    assert list(tmp_path.iterdir()) == []
    if "\\" in name:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(ValueError, match="a name with a backslash"):
            checkpoint.save("run", {"w": jnp.arange(3.0)}, step=1)


def test_09_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is, or lies below, a file; choose another"):
            checkpoint.save(path, {"w": jnp.arange(3.0)}, step=1)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        checkpoint.restore(tmp_path / "file", {"w": jnp.zeros(3)})


def test_09_read_only_directory(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with (
        pytest.raises(PermissionError, match="cannot write checkpoints to .*: Permission denied"),
        checkpoint.writing(tmp_path),
    ):
        raise AssertionError("it is found out before anything is computed")


def broken(*args):
    raise OSError(5, "Input/output error")


def test_13_save_that_failed_is_told_of_by_the_next_one_which_is_on(run, monkeypatch):
    with checkpoint.writing(run) as writer:
        with monkeypatch.context() as patch:
            patch.setattr("gradhpo.checkpoint.writer.write_arrays", broken)
            writer.save(tree(60), step=60)
            while writer.busy:
                time.sleep(0.01)
        with pytest.raises(CheckpointError, match="cannot save step 60 .*Input/output error"):
            writer.save(tree(80), step=80)
        writer.wait()
        assert checkpoint.steps(run) == [40, 80]


def test_13_save_that_failed_is_told_of_at_the_end(run, monkeypatch):
    monkeypatch.setattr("gradhpo.checkpoint.writer.write_arrays", broken)
    with pytest.raises(CheckpointError, match="step 60"), checkpoint.writing(run) as writer:
        writer.save(tree(60), step=60)
    with pytest.raises(ZeroDivisionError) as error, checkpoint.writing(run) as writer:
        writer.save(tree(60), step=60)
        _ = 1 / 0
    assert any("cannot save step 60" in note for note in error.value.__notes__)
    assert checkpoint.steps(run) == [20, 40]
    assert not list(run.glob(".unfinished*"))


def test_13_state_is_that_of_the_call_whatever_is_written_into_it_later(tmp_path, monkeypatch):
    state, go = {"w": np.arange(3.0)}, threading.Event()
    real = checkpoint.writer.encoded
    monkeypatch.setattr("gradhpo.checkpoint.writer.encoded", lambda x: go.wait() and real(x))
    with checkpoint.writing(tmp_path) as writer:
        writer.save(state, step=1)
        state["w"][:] = -1
        go.set()
    assert checkpoint.restore(tmp_path, state)["w"].tolist() == [0, 1, 2]


def test_56_state_that_was_donated_cannot_be_saved(tmp_path, monkeypatch):
    state, go = {"w": jnp.arange(3.0)}, threading.Event()
    real = checkpoint.writer.encoded
    monkeypatch.setattr("gradhpo.checkpoint.writer.encoded", lambda x: go.wait() and real(x))
    with checkpoint.writing(tmp_path) as writer:
        writer.save(state, step=1)
        state["w"].delete()  # as donation does
        go.set()
        with pytest.raises(CheckpointError, match=r"leaf \['w'\] has been donated"):
            writer.wait()
        with pytest.raises(ValueError, match=r"leaf \['w'\] has been donated"):
            writer.save(state, step=1)


def test_47_what_cannot_be_saved_is_refused_at_once_by_name(tmp_path):
    with checkpoint.writing(tmp_path) as writer:
        for leaf, match in (
            ("text", r"leaf \['x'\] is a str"),
            (np.array(["text"]), r"leaf \['x'\] has the dtype <U4"),
            (np.array([None]), "dtype object"),
            (np.zeros(2, "M8[s]"), "dtype datetime64"),
            (np.zeros(2, [("a", "i4")]), "which JAX does not know"),
            (np.zeros(2, "V8"), "which JAX does not know"),
            (jax.ShapeDtypeStruct((2,), "f4"), "is a ShapeDtypeStruct"),
        ):
            with pytest.raises(TypeError, match=match):
                writer.save({"x": leaf}, step=1)
        with pytest.raises(TypeError, match=r"leaf \['x'\] is being traced"):
            jax.jit(lambda x: writer.save({"x": x}, step=1))(1.0)
        with pytest.raises(TypeError, match="does not know its step"):
            writer.save({"x": 1.0})
        with pytest.raises(TypeError, match=r"about\['f'\]\[0\] is a builtin_function"):
            writer.save({"x": 1.0}, step=1, about={"f": [len]})
        for step in (-1, 1.5, "1"):
            with pytest.raises((TypeError, ValueError), match="step must be"):
                writer.save({"x": 1.0}, step=step)
    assert checkpoint.steps(tmp_path) == []


def test_02_numbers_have_to_grow(run):
    with checkpoint.writing(run) as writer:
        writer.save(tree(40), step=40)  # the very state that is there
        writer.wait()
        for step, state in ((40, tree(41)), (30, tree(30)), (20, tree(20))):
            writer.save(state, step=step)
            with pytest.raises(CheckpointError, match=f"step {step} .*0040 is there, of another"):
                writer.wait()
    assert checkpoint.steps(run) == [20, 40]
    with pytest.raises(FileExistsError, match="a checkpoint is never replaced"):
        checkpoint.save(run, tree(40), step=40)


def test_45_huge_numbers(tmp_path):
    numbers = [9_999_999_999, 10_000_000_000, 2**63]
    for step in numbers:
        checkpoint.save(tmp_path, tree(step % 7), step=step)
    assert checkpoint.steps(tmp_path) == numbers
    assert bits(checkpoint.restore(tmp_path, template())) == bits(tree(2**63 % 7))
    for name in ("step-00000000001", "step-1", "step-٠٠٠٠٠٠٠٠٠١", "step-0000000001.damaged"):
        (tmp_path / name).mkdir()  # none of ours
    assert checkpoint.steps(tmp_path) == numbers


def test_02_what_cannot_be_removed_costs_no_save(run, monkeypatch):
    """Of the old ones, which are tried again at the next."""
    real = directory.remove

    def busy(path, step):
        if step == 20:
            raise OSError(16, "Device or resource busy")
        real(path, step)

    monkeypatch.setattr(directory, "remove", busy)
    with checkpoint.writing(run, keep=2) as writer:
        writer.save(tree(60), step=60)
        with pytest.warns(GradhpoWarning, match="0020 cannot be removed: .*busy"):
            writer.wait()
        assert checkpoint.steps(run) == [20, 40, 60]
        monkeypatch.undo()
        writer.save(tree(80), step=80)
    assert checkpoint.steps(run) == [60, 80]


def test_02_a_single_save_removes_nothing(run):
    for step in (60, 80, 100):
        checkpoint.save(run, tree(step), step=step)
    assert checkpoint.steps(run) == [20, 40, 60, 80, 100]


def test_23_newest_is_the_highest_step_whatever_the_clock_says(run):
    os.utime(run / "step-0000000020", (2**31, 2**31))
    os.utime(run / "step-0000000040", (0, 0))
    assert bits(checkpoint.restore(run, template())) == bits(tree(40))
