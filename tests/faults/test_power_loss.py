"""What was not flushed when the power failed is gone, or is there without its content.

A shim of `os.fsync` notes what has reached the disk: the bytes of a file, the names in a directory.
Of that two disks are made: one that has lost every name that was not flushed, and one that has kept
all names but, of files that were not flushed, no content (as journaling file systems do).
"""

import os
import stat

import pytest
from checkpoint_cases import bits, files, template, tree

from gradhpo import checkpoint


class Disk:
    """What has been flushed below a directory. Files stay open, so that no number of one is used
    again."""

    def __init__(self, root, to):
        self.root, self.to = root, to
        self.contents, self.names = {}, {}
        self._open, self.worlds = [], {}
        for path in (root, *root.rglob("*")):
            self.flushed(os.open(path, os.O_RDONLY))

    def flushed(self, number):
        self._open.append(number)
        about = os.fstat(number)
        if stat.S_ISDIR(about.st_mode):
            entries = {name: os.lstat(name, dir_fd=number) for name in os.listdir(number)}
            self.names[about.st_ino] = {name: entry.st_ino for name, entry in entries.items()}
        else:
            self.contents[about.st_ino] = os.pread(number, about.st_size, 0)

    def watch(self, monkeypatch):
        fsync, rename = os.fsync, os.rename

        def noting_fsync(number):
            fsync(number)
            self.flushed(os.dup(number))
            self.keep()

        def noting_rename(*args, **kwargs):
            rename(*args, **kwargs)
            self.keep()

        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "rename", noting_rename)

    def keep(self):
        """Both disks, if the power fails now; those that differ in what has a name."""
        for world in (self.cautious(), self.hasty()):
            named = {k: v for k, v in world.items() if ".unfinished" not in k}
            key = tuple(sorted(named.items()))
            if key not in self.worlds:
                self.worlds[key] = write(self.to / f"{len(self.worlds):03d}", named)

    def cautious(self):
        """Names and contents that were flushed."""
        found = {}

        def enter(number, path):
            for name, below in self.names[number].items():
                if below in self.names:
                    enter(below, f"{path}{name}/")
                else:
                    found[f"{path}{name}"] = self.contents.get(below, b"")

        enter(self.root.stat().st_ino, "")
        return found

    def hasty(self):
        """All names, with contents that were flushed."""
        return {
            str(file.relative_to(self.root)): self.contents.get(file.stat().st_ino, b"")
            for file in files(self.root)
        }

    def close(self):
        for number in self._open:
            os.close(number)


def write(path, world):
    for name, content in world.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def disk_of(tmp_path, monkeypatch):
    disks = []

    def make(root):
        disk = Disk(root, tmp_path / "disks")
        disks.append(disk)
        disk.watch(monkeypatch)
        return disk

    yield make
    monkeypatch.undo()
    for disk in disks:
        disk.close()


@pytest.mark.filterwarnings("error::gradhpo.GradhpoWarning")  # nothing damaged is met
def test_03_power_loss_leaves_the_old_or_the_new_state(run, disk_of, monkeypatch):
    disk = disk_of(run)
    with checkpoint.writing(run, keep=2) as writer:
        writer.save(tree(60), step=60)
        writer.wait()
        after = write(disk.to / "after", disk.cautious())
    monkeypatch.undo()
    newest = []
    for path in disk.worlds.values():
        newest.append(checkpoint.steps(path)[-1])
        assert bits(checkpoint.restore(path, template())) == bits(tree(newest[-1]))
    assert set(newest) == {40, 60} and len(newest) > 2
    # What `wait` has promised is on the disk.
    assert bits(checkpoint.restore(after, template())) == bits(tree(60))


def test_03_a_new_directory_is_on_the_disk_with_its_first_checkpoint(
    tmp_path, disk_of, monkeypatch
):
    root = tmp_path / "root"
    root.mkdir()
    disk = disk_of(root)
    checkpoint.save(root / "runs" / "a", tree(1), step=1)
    after = write(tmp_path / "after", disk.cautious())
    monkeypatch.undo()
    assert bits(checkpoint.restore(after / "runs" / "a", template())) == bits(tree(1))
