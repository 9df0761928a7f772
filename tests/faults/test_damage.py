"""Checkpoints whose files are missing, cut off or changed: never loaded in silence."""

import random
import shutil

import numpy as np
import pytest
from checkpoint_cases import bits, copied, files, saved, signed, template, tree

from gradhpo import GradhpoWarning, checkpoint
from gradhpo.checkpoint import CheckpointDamaged, reader
from gradhpo.checkpoint.reader import intact

# Orbax opens arrays side by side, and when one fails it does not wait for the others.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in")

TEARS = {
    "delete": lambda file: file.unlink(),
    "truncate": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zero": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("tear", TEARS)
def test_04_torn_file_is_named_and_the_checkpoint_before_is_taken(run, tmp_path, tear):
    newest = run / "step-0000000040"
    names = [file.relative_to(newest) for file in files(newest)]
    torn = 0
    for i, name in enumerate(names):
        directory = copied(run, tmp_path / str(i))
        file = directory / newest.name / name
        before = file.read_bytes()
        TEARS[tear](file)
        if file.exists() and file.read_bytes() == before:
            continue  # it was empty
        torn += 1
        with checkpoint.writing(directory) as writer:
            with pytest.warns(GradhpoWarning, match=f"{name.name}.* It is now .*40.damaged"):
                found = writer.newest()
            assert found.manifest.step == 20
            aside = directory / f"{newest.name}.damaged"
            assert file.name in ("SHA256SUMS", "manifest.json") or len(files(aside)) > 1
        if i == 0:
            assert bits(found.restore(template())) == bits(tree(20))
            with checkpoint.writing(directory) as writer:  # the number is free again
                assert writer.newest().manifest.step == 20
                writer.save(tree(40), step=40)
            assert checkpoint.steps(directory) == [20, 40]
    assert torn >= 6


def test_04_a_file_too_many_is_damage(run):
    (run / "step-0000000040" / "arrays" / "more").write_text("x")
    with pytest.warns(GradhpoWarning, match="arrays/more is not in SHA256SUMS"):
        assert checkpoint.load(run)[0]["['host']"][0] == 20


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_05_five_hundred_flipped_bits_are_all_found(run):
    path, draw, found = run / "step-0000000040", random.Random(0), 0
    some = [file for file in files(path) if file.stat().st_size]
    for _ in range(500):
        file = draw.choice(some)
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(CheckpointDamaged) as error:
            intact(path)
        # A flip in the list of digests may read as another file's.
        found += file.name in str(error.value) or file.name == "SHA256SUMS"
        flip(file, bit)
    assert found == 500
    intact(path)


def test_05_flipped_bits_are_found_by_the_digests_of_leaves_alone(tmp_path):
    """With digests of files that fit, as after a copy by a tool that makes its own."""
    state = {"w": np.arange(40_000.0)}
    path, draw, found = checkpoint.save(tmp_path / "run", state, step=1), random.Random(1), 0
    data = max(files(path), key=lambda file: file.stat().st_size)
    assert data.stat().st_size >= state["w"].nbytes
    for _ in range(24):
        bit = draw.randrange(8 * data.stat().st_size)
        flip(data, bit)
        signed(path)
        with pytest.raises(CheckpointDamaged) as error:
            checkpoint.restore(tmp_path / "run", state)
        found += "leaf ['w'] differs from its digest" in str(error.value)
        flip(data, bit)
    assert found > 12


def test_06_all_damaged_is_an_error_at_every_start_and_never_a_fresh_one(run):
    (run / "step-0000000020" / "manifest.json").unlink()
    flip(run / "step-0000000040" / "manifest.json", 100)
    for _ in range(2):
        with checkpoint.writing(run) as writer, pytest.raises(CheckpointDamaged) as error:
            writer.newest()
        for part in ("0020: manifest.json is missing", "0040: manifest.json is not the file"):
            assert part in str(error.value)
        with pytest.raises(CheckpointDamaged, match="no checkpoint in .* is intact"):
            checkpoint.restore(run, template())
    assert checkpoint.steps(run) == [20, 40]


def test_04_damage_that_cannot_be_set_aside_blocks_later_saves_of_its_number(run, monkeypatch):
    (run / "step-0000000040" / "manifest.json").unlink()

    def refused(directory, step):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gradhpo.checkpoint.directory.set_aside", refused)
    with checkpoint.writing(run) as writer:
        with pytest.warns(GradhpoWarning, match="cannot be renamed: Permission denied"):
            assert writer.newest().manifest.step == 20
        writer.save(tree(40), step=40)
        with pytest.raises(checkpoint.CheckpointError, match="step 40 .* manifest.json is missing"):
            writer.wait()


def test_04_what_cannot_be_read_for_another_reason_keeps_its_name(run, monkeypatch):
    def many(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("gradhpo.checkpoint.directory._sums", many)
    with checkpoint.writing(run) as writer, pytest.raises(OSError, match="Too many open files"):
        writer.newest()
    assert checkpoint.steps(run) == [20, 40]


def test_04_a_second_damaged_one_of_a_number_is_kept_beside_the_first(run, tmp_path):
    for name in ("step-0000000040.damaged", "step-0000000040.damaged-1"):
        (run / "step-0000000040" / "manifest.json").unlink()
        with checkpoint.writing(run) as writer, pytest.warns(GradhpoWarning, match=f"{name}\\."):
            writer.newest()
        with checkpoint.writing(run) as writer:
            writer.save(tree(40), step=40)
    assert checkpoint.steps(run) == [20, 40]


def test_04_a_checkpoint_under_another_number_is_none(run):
    (run / "step-0000000040").rename(run / "step-0000000060")
    with pytest.warns(GradhpoWarning, match="0060: it holds step 40"):
        assert checkpoint.load(run)[0]["['host']"][0] == 20


def test_06_reader_beside_a_writer_reads_on_with_a_newer_one(run, monkeypatch):
    """Between looking and reading, a writer has saved 60 and 80, and removed 20 and 40."""
    real, done = reader.intact, []

    def slow(path):
        if not done:
            done.append(path)
            other = saved(run.parent / "other", 60, 80)
            for step in (20, 40):
                shutil.rmtree(run / f"step-{step:010d}")
            for step in (60, 80):
                (other / f"step-{step:010d}").rename(run / f"step-{step:010d}")
        return real(path)

    monkeypatch.setattr(reader, "intact", slow)
    assert bits(checkpoint.restore(run, template())) == bits(tree(80))


def test_06_reader_reads_a_newer_one_when_its_own_is_removed_under_its_hands(run, monkeypatch):
    real, done = reader.read_arrays, []

    def slow(path, avals):
        if not done:
            done.append(path)
            with checkpoint.writing(run, keep=1) as writer:
                writer.save(tree(60), step=60)
        return real(path, avals)

    monkeypatch.setattr(reader, "read_arrays", slow)
    assert bits(checkpoint.restore(run, template())) == bits(tree(60))
    assert len(done) == 1 and checkpoint.steps(run) == [60]
