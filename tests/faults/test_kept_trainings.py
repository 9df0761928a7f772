"""What `gradhpo tune` and `compare` keep of their trainings: lines that are damaged, of another run
or release, links, and directories that are used again."""

import errno
import importlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_commands import TASK

from gradhpo import GradhpoWarning, cli
from gradhpo.tuning import command, directory, journal, places, sequences, training
from gradhpo.tuning.journal import Done, Journal, LogRow
from gradhpo.tuning.places import Place

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("filelock")
pytestmark = pytest.mark.filterwarnings("ignore:tune has been compiled")  # of every task anew

SHORT = ("kept_task:task", "--episodes", "2", "--steps", "5")
ALONE = ("tune", *SHORT, "--alone")


@pytest.fixture
def gradhpo(tmp_path, monkeypatch, capsys):
    """`gradhpo("tune", ...) -> (status, stderr)`, in an empty directory with a task; states are
    saved after every episode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "EVERY", 0.0)
    monkeypatch.setattr(importlib.import_module("gradhpo.tuning.result"), "figures", lambda *_: {})
    (tmp_path / "kept_task.py").write_text(TASK)

    def call(*arguments):
        return cli.main(list(arguments)), capsys.readouterr().err

    yield call
    sys.modules.pop("kept_task", None)


@pytest.fixture
def cut(gradhpo, monkeypatch):
    """Has the next commands interrupted after their n-th episode."""
    look = training._Look.__call__

    def after(episodes):
        left = iter(range(episodes - 1, -1, -1))

        def interrupted(self, episode, state):
            go_on = look(self, episode, state)
            if not next(left):
                monkeypatch.setattr(training._Look, "__call__", look)
                raise KeyboardInterrupt
            return go_on

        monkeypatch.setattr(training._Look, "__call__", interrupted)

    return after


def edited(here, old, new):
    text = (here / "kept_task.py").read_text()
    assert old in text
    (here / "kept_task.py").write_text(text.replace(old, new))
    del sys.modules["kept_task"]


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def found(out):
    return json.loads((out / "result.json").read_text())["methods"]["random"]["metrics"]


def test_16_no_training_of_a_run_that_was_removed_is_taken_for_another(gradhpo, tmp_path):
    """`rm a/*` leaves the directory `checkpoints`."""
    pytest.importorskip("optuna")
    compare = ("compare", *SHORT, "--method", "random", "--budget", "40")
    assert gradhpo(*compare, "--width", "3", "--out", "a")[0] == 0
    assert gradhpo(*compare, "--width", "0.1", "--out", "b")[0] == 0
    for path in (tmp_path / "a").iterdir():
        if path.is_file():
            path.unlink()
    before = content(tmp_path / "a")
    status, err = gradhpo(*compare, "--width", "0.1", "--out", "a")
    assert status == 1 and "run.json is missing" in err and "--overwrite" in err
    assert content(tmp_path / "a") == before
    assert gradhpo(*compare, "--width", "0.1", "--out", "a", "--overwrite")[0] == 0
    assert found(tmp_path / "a") == found(tmp_path / "b")
    assert not list((tmp_path / "a/checkpoints").glob(f"{directory.EARLIER}*"))


def test_09_a_command_that_cannot_run_destroys_no_training(gradhpo, cut, tmp_path, monkeypatch):
    """Whether it ends by an error, or is killed before its first episode is done."""
    assert gradhpo(*ALONE, "--out", "whole")[0] == 0
    cut(2)
    assert gradhpo(*ALONE, "--out", "a")[0] == 130
    before = content(tmp_path / "a")
    assert any("seed0-tuned/step-0000000005/" in str(path) for path in before)
    edited(tmp_path, "(w - batch) ** 2) + lam", "(w - batch) ** 2, oops) + lam")
    with pytest.raises(NameError):
        gradhpo(*ALONE, "--out", "a", "--overwrite")
    assert content(tmp_path / "a") == before
    with monkeypatch.context() as patch, pytest.raises(NameError):
        patch.setattr(directory, "_settle", lambda out: None)  # as if killed
        gradhpo(*ALONE, "--out", "a", "--overwrite")
    assert content(tmp_path / "a") != before
    edited(tmp_path, ", oops) + lam", ") + lam")
    assert gradhpo(*ALONE, "--out", "a", "--resume")[0] == 0
    logs = [(tmp_path / out / "seed0.csv").read_bytes() for out in ("a", "whole")]
    assert logs[0] == logs[1]
    for path, lines in before.items():
        if path.name == "episodes.jsonl":  # with the seconds that it took: it was not trained again
            first = b"".join(lines.splitlines(keepends=True)[:2])
            assert (tmp_path / "a" / path).read_bytes().startswith(first)


def test_09_what_a_killed_command_has_set_aside_comes_back(gradhpo, tmp_path, monkeypatch):
    """Also where the run that it was to overwrite is finished; files of others stay."""
    assert gradhpo(*ALONE, "--out", "a")[0] == 0
    before = content(tmp_path / "a")

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training, "tune", killed)
        patch.setattr(directory, "_settle", lambda out: None)
        gradhpo(*ALONE, "--out", "a", "--overwrite")
    (aside,) = (tmp_path / "a/checkpoints").glob(f"{directory.EARLIER}*")
    (aside / "mine.txt").write_text("mine")
    (tmp_path / "a/checkpoints/.earlier-drafts").mkdir()
    status, _ = gradhpo(*ALONE, "--out", "a", "--resume")
    assert status == 0 and before.items() <= content(tmp_path / "a").items()
    assert (aside / "mine.txt").read_text() == "mine" and len(list(aside.iterdir())) == 1
    assert (tmp_path / "a/checkpoints/.earlier-drafts").is_dir()


def test_09_what_cannot_begin_destroys_no_results(gradhpo, tmp_path, monkeypatch):
    """`run.json` cannot be written when the first episode is done, which is no result either."""
    assert gradhpo(*ALONE, "--out", "a")[0] == 0
    before = content(tmp_path / "a")

    def full(path, text, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        status, err = gradhpo(*ALONE, "--out", "a", "--overwrite")
    assert status == 1 and "No space left on device" in err and "run.json" in err
    assert content(tmp_path / "a") == before


@pytest.mark.parametrize("name", ["hyperparams.json", "seed0.csv", "result.json"])
def test_16_a_result_that_was_removed_is_written_again(gradhpo, tmp_path, name):
    assert gradhpo(*ALONE, "--out", "a")[0] == 0
    before = (tmp_path / "a" / name).read_text()
    (tmp_path / "a" / name).unlink()
    assert gradhpo(*ALONE, "--out", "a", "--resume")[0] == 0
    after = (tmp_path / "a" / name).read_text()
    assert after == before or name == "result.json"  # which has times in it


@pytest.mark.parametrize("changed", ["space", "sampler"])
def test_18_what_a_search_has_found_is_of_what_it_draws(
    gradhpo, cut, tmp_path, monkeypatch, changed
):
    """No training tells: without derivatives a space is in no program."""
    pytest.importorskip("optuna")
    search = (*ALONE, "--method", "random", "--trials", "4")
    cut(6)
    assert gradhpo(*search, "--out", "a")[0] == 130
    before = content(tmp_path / "a")
    if changed == "space":
        other = '{"decay": gh.spaces.log(), "rate": gh.spaces.interval(0.001, 0.6)}'
        edited(tmp_path, "gh.spaces.log()", other)
    else:
        drawn = sequences.search_box
        monkeypatch.setattr(
            sequences, "search_box", lambda *given: drawn(*given[:-1], seed=given[-1] + 1)
        )
    status, err = gradhpo(*search, "--out", "a", "--resume")
    assert status == 1 and "training 1 of the search was one with hyperparams/" in err
    result = Path("result.json")
    assert content(tmp_path / "a")[result] == before[result]


def test_18_a_warm_start_finds_out_that_the_task_has_changed(gradhpo, tmp_path, monkeypatch):
    """Cut off when the probes are done, and the training that begins there has no state."""
    pytest.importorskip("optuna")

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "trained", cut_off)
        assert gradhpo(*ALONE, "--warm-start", "2", "--out", "a")[0] == 130
    edited(tmp_path, "normal(2.0", "normal(2.5")
    status, err = gradhpo(*ALONE, "--warm-start", "2", "--out", "a", "--resume")
    assert status == 1 and "is of another run" in err


def journal_of(path, rows, run="a"):
    kept = Journal(Done, path, run)
    for i in range(rows):
        kept.add(Done({"val_loss": 1.0 + i}, {"rate": 0.1}, 1.0, 0.0, 3600.0))
    return path, kept.rows


def test_05_a_flipped_bit_costs_no_line_before_it(tmp_path):
    path, rows = journal_of(tmp_path / "trainings.jsonl", 20)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    for k, before in ((0, 0), (1, 0), (7, 6), (20, 19)):
        flipped = bytearray(whole)
        flipped[len(b"\n".join(lines[:k])) + 20] ^= 1
        path.write_bytes(flipped)
        with pytest.warns(GradhpoWarning, match=f"line {k + 1} of .* is damaged"):
            kept = Journal(Done, path, "a")
        assert kept.rows == rows[:before]
        assert path.read_bytes() == flipped  # reading changes nothing
        kept.add(rows[before])
        assert Journal(Done, path, "a").rows == rows[: before + 1]
        aside = path.with_name("trainings.jsonl.damaged")
        assert aside.read_bytes() == flipped
        aside.unlink()
    path.write_bytes(whole[:-9])  # cut off: what is missing is told by nothing, and costs no more
    kept = Journal(Done, path, "a")
    assert kept.rows == rows[:-1]
    kept.add(rows[-1])
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


def test_05_damaged_lines_of_a_training_are_told_and_kept(gradhpo, cut, tmp_path):
    assert gradhpo(*ALONE, "--episodes", "4", "--out", "whole")[0] == 0
    cut(3)
    assert gradhpo(*ALONE, "--episodes", "4", "--out", "a")[0] == 130
    path = tmp_path / "a/checkpoints/seed0-tuned/episodes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step": 15', b'"step": 16'))
    with pytest.warns(GradhpoWarning) as told:
        assert gradhpo(*ALONE, "--episodes", "4", "--out", "a", "--resume")[0] == 0
    assert [str(each.message).count("line 4 of") for each in told][0] == 1
    assert b'"step": 16' in path.with_name("episodes.jsonl.damaged").read_bytes()
    logs = [(tmp_path / out / "seed0.csv").read_bytes() for out in ("a", "whole")]
    assert logs[0] == logs[1]


def test_16_lines_of_another_run_are_not_read(tmp_path):
    path, _ = journal_of(tmp_path / "trainings.jsonl", 3)
    before = path.read_bytes()
    with pytest.warns(GradhpoWarning, match="none of this run"):
        assert Journal(Done, path, "b").rows == []
    assert path.read_bytes() == before


def test_19_lines_of_an_earlier_release_are_read_and_of_a_later_one_kept(tmp_path, monkeypatch):
    path, rows = journal_of(tmp_path / "trainings.jsonl", 3)
    later = NamedTuple("Done", [*Done.__annotations__.items(), ("note", str)])
    later.__new__.__defaults__ = (False, "")
    kept = Journal(later, path, "a")
    assert [row[:-1] for row in kept.rows] == [tuple(row) for row in rows]
    kept.add(later(*rows[0], "of a later release"))
    with pytest.warns(GradhpoWarning, match=r"line 5 of .* of this run and release \(.*'note'"):
        assert Journal(Done, path, "a").rows == rows
    monkeypatch.setattr(journal, "FORMAT", 2)
    with pytest.warns(GradhpoWarning, match="'format': 1.*'format': 2"):
        assert Journal(Done, path, "a").rows == []


def test_65_what_is_set_aside_beyond_a_link_stays(gradhpo, tmp_path):
    assert gradhpo(*ALONE, "--out", "a")[0] == gradhpo(*ALONE, "--out", "b")[0] == 0
    kept = tmp_path / "a/checkpoints"
    aside = kept / f"{directory.EARLIER}{'0' * 16}"
    aside.mkdir()
    (kept / "seed0-tuned").rename(aside / "seed0-tuned")
    before = content(kept)
    (tmp_path / "b/result.json").unlink()  # else there is nothing to do
    (tmp_path / "b/checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "b/checkpoints").symlink_to(kept)
    status, err = gradhpo(*ALONE, "--out", "b", "--resume")
    assert status == 1 and "checkpoints is a link" in err
    assert content(kept) == before


def test_65_links_among_kept_trainings_are_not_followed(gradhpo, tmp_path):
    mine, elsewhere = tmp_path / "mine.txt", tmp_path / "elsewhere"
    mine.write_text("mine")
    elsewhere.mkdir()
    path, rows = journal_of(tmp_path / "trainings.jsonl", 1)
    kept = Journal(Done, path, "a")
    path.unlink()
    path.symlink_to(mine)
    with pytest.warns(GradhpoWarning, match="cannot write to"):
        kept.add(rows[0])
    for wrong in (path, tmp_path / "dangling.jsonl"):
        wrong.is_symlink() or wrong.symlink_to(tmp_path / "nothing")
        with pytest.raises(NotADirectoryError, match="is a link"):
            Journal(LogRow, wrong)
    (tmp_path / "training003").symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError, match="is a link"):
        Place(tmp_path).part(3)
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/seed0-tuned").symlink_to(elsewhere)
    status, err = gradhpo(*ALONE, "--out", "a")
    assert status == 1 and "seed0-tuned is a link" in err
    assert mine.read_text() == "mine" and not list(elsewhere.iterdir())
    assert not (tmp_path / "nothing").exists()
