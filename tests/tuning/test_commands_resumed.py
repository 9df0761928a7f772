"""`gradhpo tune` and `compare` that are cut off and go on: the same files in the end."""

import json
import os
import signal
import sys
import tempfile

import pytest

from gradhpo import GradhpoWarning, cli
from gradhpo.checkpoint.lock import only_writer
from gradhpo.tuning import places, result, training
from gradhpo.tuning.directory import FREE

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("filelock")

SHORT = ("small:strict", "--episodes", "4", "--steps", "5", "--outer-rate", "0.1")


@pytest.fixture
def run(here, capsys, monkeypatch):
    """`run("tune", ...) -> (status, stderr)`, without figures; `run.cut(n)` has the next command
    interrupted after its n-th episode, when the journal already has it and no state."""
    monkeypatch.setattr(result, "figures", lambda rows, method: {})
    look, left = training._Look.__call__, []

    def interrupted(self, episode, state):
        go_on = look(self, episode, state)
        if left:
            left[0] -= 1
            if not left[0]:
                left.clear()
                raise KeyboardInterrupt
        return go_on

    monkeypatch.setattr(training._Look, "__call__", interrupted)

    def call(*arguments):
        status = cli.main(list(arguments))
        return status, capsys.readouterr().err

    call.cut = left.append
    return call


@pytest.fixture
def every(request, monkeypatch):
    """Seconds between two states that are saved: after every episode, or at ends alone."""
    monkeypatch.setattr(places, "EVERY", request.param)


ALL, FEW = 0.0, 1e6


def files(out):
    """What a run has left, but for its checkpoints, times and the command itself."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in ("report.html", "run.json", "compare.png"):
        found.pop(name, None)
    content = json.loads(found["result.json"])
    for name in ("wall_seconds", "command", "created"):
        content.pop(name, None)
    for name in FREE:
        content["settings"].pop(name, None)
    return found | {"result.json": content}


def written(out):
    """Which files there are, and when they were last written."""
    found = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def cut_again_and_again(run, command, cuts, here):
    """One run to its end, and one that is cut so many episodes after each beginning."""
    assert run(*command, "--out", "whole")[0] == 0
    for i, episodes in enumerate(cuts):
        run.cut(episodes)
        status, err = run(*command, "--out", "cut", *["--resume"] * bool(i))
        assert status == 130 and "is kept in" in err and "go on with --resume" in err
        assert not json.loads((here / "cut/run.json").read_text())["finished"]
    assert run(*command, "--out", "cut", "--resume")[0] == 0
    assert files(here / "cut") == files(here / "whole")


@pytest.mark.parametrize("every", [ALL, FEW], indirect=True)
def test_each_training_of_tune_goes_on(run, every, here):
    """In the tuned one, at the end of the untuned one, and in the one trained anew."""
    cut_again_and_again(run, ("tune", *SHORT), [2, 6, 3], here)
    logged = (here / "cut/seed0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [5, 10, 15, 20]


@pytest.mark.parametrize("every", [FEW], indirect=True)
def test_patience_and_a_warm_start_go_on(run, every, here):
    pytest.importorskip("optuna")
    options = ("--patience", "2", "--warm-start", "2", "--episodes", "30")
    cut_again_and_again(run, ("tune", *SHORT, *options), [35, 30, 8], here)
    found = json.loads((here / "cut/hyperparams.json").read_text())["seeds"]["0"]
    assert found["ended"] == "early"


@pytest.mark.filterwarnings("ignore::gradhpo.GradhpoWarning")
def test_a_training_that_was_stopped_does_not_go_on(run, here):
    """By a rejected update, in its first episode; the cut is in the next training."""
    options = ("--set", "rate=1e9", "--steps", "40", "--on-failure", "stop")
    cut_again_and_again(run, ("tune", *SHORT, *options), [2], here)
    found = json.loads((here / "cut/hyperparams.json").read_text())["seeds"]["0"]
    assert (found["ended"], found["episodes"]) == ("stopped", 1)


@pytest.mark.parametrize("every, method", [(ALL, "tpe"), (FEW, "cmaes")], indirect=["every"])
def test_a_search_goes_on(run, every, here, method):
    """The sampler is told of what was found, and draws the same."""
    pytest.importorskip("optuna")
    command = ("tune", *SHORT, "--method", method, "--trials", "5", "--alone")
    cut_again_and_again(run, command, [6, 11], here)


@pytest.mark.parametrize(
    "every, methods, budget, cuts",
    [(FEW, ["random", "one_step"], 130, [5, 9, 26, 6]), (ALL, ["hyperdistill"], 500, [1, 4, 5])],
    indirect=["every"],
)
def test_compare_goes_on(run, every, here, methods, budget, cuts):
    """Within trainings of a search and of a method, and between them."""
    pytest.importorskip("optuna")
    options = ("--episodes", "2", "--seeds", "2", "--budget", str(budget), "--method", *methods)
    cut_again_and_again(run, ("compare", *SHORT, *options), cuts, here)
    kept = [path.name for path in (here / "cut/checkpoints").glob("seed?-*/training0*")]
    assert kept == ["training000"] * 2 * len(methods)  # by which a changed task is found out


def test_lines_that_a_power_failure_has_taken(run, here, monkeypatch):
    """The state is ahead of them: it is set aside, and the one before it is taken."""
    monkeypatch.setattr(places, "EVERY", 0.0)
    run("tune", *SHORT, "--alone", "--out", "whole")
    run.cut(4)
    run("tune", *SHORT, "--alone", "--out", "cut")
    lines = here / "cut/checkpoints/seed0-tuned/episodes.jsonl"
    whole = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(whole[:3]) + whole[3][:-9])
    with pytest.warns(GradhpoWarning, match="ends at step 10: the state of step 15 is of no use"):
        assert run("tune", *SHORT, "--alone", "--out", "cut", "--resume")[0] == 0
    assert files(here / "cut") == files(here / "whole")


def test_a_finished_run_is_shown_again_and_can_have_more_seeds(run, here, capsys):
    run("tune", *SHORT, "--seeds", "2", "--alone", "--out", "whole")
    run("tune", *SHORT, "--alone", "--out", "a")
    log = (here / "a/seed0.csv").stat()
    assert cli.main(["tune", *SHORT, "--alone", "--out", "a", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "val_loss (lower is better)" in out and "nothing was computed" in out
    assert (here / "a/seed0.csv").stat() == log
    status, err = run("tune", *SHORT, "--seeds", "2", "--alone", "--out", "a", "--resume")
    assert status == 0 and "going on with the run" in err
    assert files(here / "a") == files(here / "whole")
    status, err = run("tune", *SHORT, "--alone", "--out", "a", "--resume")
    assert status == 1 and "--seeds: 2 -> 1" in err


def test_what_does_not_go_on_is_one_line(run, here):
    run.cut(2)
    run("tune", *SHORT, "--out", "a")
    before = written(here / "a")
    for command, message in {
        ("tune", *SHORT): "holds a run of gradhpo tune that was cut off. Go on by --resume, choose",
        ("tune", *SHORT, "--resume", "--steps", "4", "--method", "t1t2"): (
            "runs do not mix: --steps: 5 -> 4; --method: one_step -> t1t2. Give what it was"
        ),
        ("tune", "small:task", *SHORT[1:], "--resume"): "task: small:strict -> small:task",
        ("compare", *SHORT, "--resume"): "holds a run of gradhpo tune, not of gradhpo compare",
    }.items():
        status, err = run(*command, "--out", "a")
        assert status == 1 and message in err and len(err.splitlines()) == 1
    status, err = run("tune", *SHORT, "--resume", "--out", "b")
    assert status == 1 and "b holds no run to go on with; without --resume one is begun" in err
    with only_writer(here / "a"):
        status, err = run("tune", *SHORT, "--resume", "--out", "a")
    assert status == 1 and f"process {os.getpid()} on " in err and len(err.splitlines()) == 1
    assert before.items() <= written(here / "a").items()
    (here / "c").mkdir()
    (here / "c/checkpoints").symlink_to(here)
    status, err = run("tune", *SHORT, "--out", "c")
    assert status == 1 and "c/checkpoints is a link" in err
    (here / "a/run.json").write_text("{")
    assert "run.json is damaged" in run("tune", *SHORT, "--resume", "--out", "a")[1]
    with pytest.raises(SystemExit):
        run("tune", *SHORT, "--resume", "--overwrite")


def test_a_task_that_has_changed(run, here):
    run.cut(2)
    run("tune", *SHORT, "--out", "a")
    text = (here / "small.py").read_text()
    (here / "small.py").write_text(text.replace("normal(2.0", "normal(2.5"))
    del sys.modules["small"]
    status, err = run("tune", *SHORT, "--out", "a", "--resume")
    assert status == 1 and "is of another run" in err and "data" in err.split("another run")[1]
    assert len(err.splitlines()) == 2  # after: going on with


def test_without_orbax(run, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)  # others fill orbax, too
    status, err = run("tune", *SHORT, "--alone", "--out", "a")
    assert status == 0 and 'cut off: pip install ".[checkpoint]"' in err
    assert not (here / "a/checkpoints").exists() and not (here / "a/run.json").exists()
    status, err = run("tune", *SHORT, "--out", "a", "--resume")
    assert status == 2 and '--resume needs more packages: pip install ".[checkpoint]"' in err
    with only_writer(here):
        assert f"process {os.getpid()} on " in run("tune", *SHORT, "--out", ".")[1]


def test_overwrite_begins_anew_and_removes_what_is_ours(run, here):
    run.cut(6)
    run("tune", *SHORT, "--out", "a")
    other = here / "other"
    (other / "step-0000000010").mkdir(parents=True)
    kept = here / "a/checkpoints"
    (kept / "seed0-tuned/notes.txt").write_text("mine")
    (kept / "seed3-tuned").symlink_to(other)
    (kept / "seed0-untuned/step-0000000009").symlink_to(other)
    (kept / "seed0-untuned/.unfinished-thesis").mkdir()
    for name in (".going-on", ".7..going-on", ".7.episodes.jsonl"):  # the last two: cut off
        (kept / "seed0-untuned" / name).touch()
    run("tune", *SHORT, "--out", "whole", "--alone")
    assert run("tune", *SHORT, "--out", "a", "--alone", "--overwrite")[0] == 0
    assert files(here / "a") == files(here / "whole")
    assert (other / "step-0000000010").is_dir() and (kept / "seed3-tuned").is_symlink()
    assert (kept / "seed0-tuned/notes.txt").read_text() == "mine"
    assert sorted(os.listdir(kept / "seed0-untuned")) == [".unfinished-thesis", "step-0000000009"]


def test_the_disk_is_tried_out_once(run, here, monkeypatch):
    temporary, tried = tempfile.TemporaryFile, []
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda dir: tried.append(dir) or temporary(dir=dir)
    )
    assert run("tune", *SHORT, "--alone", "--out", "a")[0] == 0 and tried == [here / "a"]


def test_a_termination_ends_the_command_as_an_interrupt_does(run, here, monkeypatch):
    look = training._Look.__call__

    def terminated(self, episode, state):
        os.kill(os.getpid(), signal.SIGTERM)
        return look(self, episode, state)

    with monkeypatch.context() as patch:
        patch.setattr(training._Look, "__call__", terminated)
        status, err = run("tune", *SHORT, "--out", "a")
    assert status == 143 and err.endswith("gradhpo: terminated\n")
    assert len((here / "a/seed0.jsonl").read_text().splitlines()) == 1
    assert (here / "a/checkpoints/seed0-tuned/step-0000000005").is_dir()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run("tune", *SHORT, "--out", "a", "--resume")[0] == 0
