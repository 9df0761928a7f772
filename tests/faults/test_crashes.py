"""A save that is cut off before any call to the file system leaves whole checkpoints only.

What a crash before call k leaves is what is on the disk just before it, so a single save gives all
of them: the directory is copied before every call. (Calls that Orbax makes from C++ all lie inside
of a directory that has no name yet; the slow test kills the process at every one of those too.)
"""

import collections
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoint_cases import bits, copied, template, tree

from gradhpo import checkpoint
from gradhpo.checkpoint.reader import intact

CALLS = [(os, name) for name in "mkdir open fsync rename replace unlink rmdir close".split()]
CALLS.append((io, "open"))


class Snapshots:
    """Copies of a directory, before every call that the process makes, each content once."""

    def __init__(self, directory, to):
        self.directory, self.to = directory, to
        self.paths, self.calls = {}, 0
        self._turn, self._inside = threading.Lock(), threading.local()

    def watch(self, monkeypatch):
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, call):
        def before(*args, **kwargs):
            if not getattr(self._inside, "on", False):
                self._inside.on = True
                try:
                    with self._turn:
                        self.take()
                finally:
                    self._inside.on = False
            return call(*args, **kwargs)

        return before

    def take(self):
        """What a file without a name yet holds makes no difference, so it does not count."""
        self.calls += 1
        seen = []
        for file in sorted(self.directory.rglob("*")):
            top = file.relative_to(self.directory).parts[0]
            named = not top.startswith(".unfinished")
            seen.append((str(file), file.lstat().st_size) if named else top)
        seen = tuple(dict.fromkeys(seen))
        if seen not in self.paths:
            path = self.to / f"{len(self.paths):04d}"
            for folder, _, names in os.walk(self.directory):
                place = path / Path(folder).relative_to(self.directory)
                place.mkdir(parents=True)
                for name in names:
                    with suppressed:
                        shutil.copyfile(Path(folder, name), place / name)
            self.paths[seen] = path


class _Suppressed:
    """Orbax works in threads of its own: a file of its may be gone meanwhile."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is FileNotFoundError


suppressed = _Suppressed()


def check(directory, known, last=60):
    """One of these states comes back bit for bit, and the next save works and sweeps up."""
    with checkpoint.writing(directory) as writer:
        found = writer.newest()
        step = found.manifest.step
        assert bits(found.restore(template())) == bits(tree(step))
        assert step in known
        writer.save(tree(last + step), step=last + step)
    assert checkpoint.steps(directory)[-1] == last + step
    names = [path.name for path in directory.iterdir() if not path.name.startswith("step-")]
    assert not names
    return step


def test_02_crash_before_every_call_of_a_save_leaves_the_old_or_the_new_state(
    run, tmp_path, monkeypatch
):
    shots = Snapshots(run, tmp_path / "shots")
    with monkeypatch.context() as patch, checkpoint.writing(run, keep=2) as writer:
        shots.watch(patch)
        writer.save(tree(60), step=60)
        writer.wait()
    assert checkpoint.steps(run) == [40, 60]
    assert shots.calls > 60

    found = []
    for path in shots.paths.values():
        # 12: nor are there ever fewer whole ones than before
        assert sum(whole(path, step) for step in checkpoint.steps(path)) >= 2
        arrays, _ = checkpoint.load(path)
        found.append(checkpoint.steps(path)[-1])
        assert arrays["['host']"].tobytes() == tree(found[-1])["host"].tobytes()
    assert found == sorted(found) and set(found) == {40, 60}
    # The next writer: for every set of names there may be.
    tops = {
        tuple(sorted(p.name[:20] for p in path.iterdir())): path for path in shots.paths.values()
    }
    assert len(tops) >= 4
    for path in tops.values():
        check(path, {40, 60})


def whole(directory, step):
    intact(directory / f"step-{step:010d}")
    return True


def test_12_crash_in_a_removal_leaves_no_half_of_a_checkpoint(run, tmp_path, monkeypatch):
    shots = Snapshots(run, tmp_path / "shots")
    with monkeypatch.context() as patch:
        from gradhpo.checkpoint import directory as folder

        shots.watch(patch)
        folder.remove(run, 20)
    for path in shots.paths.values():
        assert all(whole(path, step) for step in checkpoint.steps(path))
        assert 40 in checkpoint.steps(path)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
def test_12_as_many_stay_as_were_asked_for(tmp_path, keep):
    with checkpoint.writing(tmp_path, keep=keep) as writer:
        for step in range(1, 7):
            writer.save({"w": step}, step=step)
            writer.wait()
            assert checkpoint.steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


CHILD = """
import sys
sys.path.insert(0, {here!r})
from checkpoint_cases import tree
from gradhpo import checkpoint
with checkpoint.writing(sys.argv[1], keep=2) as writer:
    print("begun", flush=True)
    writer.save(tree(60), step=60)
"""
TRACED = "rename fsync mkdir unlink unlinkat rmdir".split()
STRACE = shutil.which("strace")
KILLS = 2  # of every kind of call, evenly spread; renames and fsyncs three times as many


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(STRACE is None, reason="needs strace")
@pytest.mark.parametrize("call", TRACED)
def test_02_process_killed_at_a_system_call(two_checkpoints, tmp_path, call):
    def save(*options):
        directory = copied(two_checkpoints, tmp_path / "run")
        child = CHILD.format(here=str(Path(__file__).parent))
        command = [STRACE, "-f", "-qq", *options, sys.executable, "-c", child, str(directory)]
        return directory, subprocess.run(command, capture_output=True, text=True)

    log = tmp_path / "log"
    directory, done = save("-e", f"trace={call}", "-o", str(log))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(directory)
    count, ours = collections.Counter(), set()  # strace counts for every thread apart
    for line in log.read_text().splitlines():
        thread = line.split()[0]
        count[thread] += f" {call}(" in line
        if str(directory) in line or call in ("fsync", "unlinkat"):  # these name descriptors
            ours.add(count[thread])
    assert ours
    ours = sorted(ours)
    every = -(-len(ours) // (KILLS * (3 if call in TRACED[:2] else 1)))
    codes = []
    for k in ours[::every]:
        directory, killed = save("-e", f"inject={call}:signal=KILL:when={k}")
        codes.append(killed.returncode)
        check(directory, {40, 60})
        shutil.rmtree(directory)
    assert set(codes) <= {0, -9, 137} and any(codes)  # 0: that thread had less to do this time
