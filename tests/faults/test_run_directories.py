"""The directory of `gradhpo run`: cut off, damaged, in use, or of another run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from gradhpo import cli  # noqa: E402
from gradhpo.report import (  # noqa: E402
    StudyResult,
    parts,
    provenance,
    run_directory,
    run_record,
    summarize,
)
from gradhpo.report.config import StudyConfig  # noqa: E402
from gradhpo.report.parts import once  # noqa: E402
from gradhpo.studies import registry  # noqa: E402

PROGRAM = """
import os, sys, time
from gradhpo import cli
from gradhpo.studies import registry
sys.path.insert(0, sys.argv.pop(1))
registry.STUDIES["counting"] = registry.Study("test_run_directories", "counts")
sys.exit(cli.main())
"""


@dataclass(frozen=True)
class Config(StudyConfig):
    rate: float = 0.1
    parts: int = 4


Config.known_methods = classmethod(lambda cls: ("one", "two"))


def compute(seed, rate):
    with open(os.environ["COUNTED"], "a") as file:
        file.write(f"{seed}\n")
    time.sleep(float(os.environ.get("PART_SECONDS", "0")))
    return np.random.default_rng(seed).normal(size=3) * rate


def run(config, progress):
    found = []
    for seed in range(config.parts):
        found.append(once(f"seed {seed}", compute, seed, config.rate))
        progress(f"counting: seed {seed}")
        if os.environ.get("STOP") == str(seed):
            raise KeyboardInterrupt
    draw = lambda path: path.write_bytes(np.array(found).tobytes())  # noqa: E731
    methods = summarize({"one": {"val_loss": np.array(found)[:, 0]}})
    return StudyResult("counting", config, methods, wall_seconds=0.5, files={"a.png": draw})


@pytest.fixture(autouse=True)
def counting(monkeypatch, tmp_path):
    """Registers the study, in an empty directory; the result is a list of the parts computed."""
    study = ModuleType("counting_study")
    vars(study).update(Config=Config, run=run)
    monkeypatch.setitem(sys.modules, "counting_study", study)
    monkeypatch.setitem(registry.STUDIES, "counting", registry.Study("counting_study", "counts"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted.txt"))
    (tmp_path / "counted.txt").touch()
    monkeypatch.delenv("GRADHPO_TRACEBACK", raising=False)
    return lambda: (tmp_path / "counted.txt").read_text().split()


def gradhpo(capsys, *options):
    status = cli.main(["run", "counting", *options])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def files(out):
    found = {path.name: path.read_bytes() for path in Path(out).iterdir()}
    result = json.loads(found.pop("result.json"))
    del result["wall_seconds"], result["command"], result["settings"]["out"]
    run = json.loads(found.pop("run.json"))
    assert run.pop("id") and run["finished"]
    return found | {"run": run, "result": result}


@pytest.fixture
def cut(capsys, monkeypatch):
    """A directory `d`, cut off after two of four parts, beside `whole`, which is finished."""
    assert gradhpo(capsys, "--out", "whole")[0] == 0
    Path("counted.txt").write_text("")
    monkeypatch.setenv("STOP", "1")
    status, out, err = gradhpo(capsys, "--out", "d")
    monkeypatch.delenv("STOP")
    assert (status, out) == (130, "") and "2 finished parts are kept in" in err
    assert "go on with --resume" in err and err.splitlines()[-1] == "gradhpo: interrupted"
    return Path("d")


def test_14_what_was_finished_is_not_done_again(cut, capsys, counting):
    status, out, err = gradhpo(capsys, "--out", "d", "--resume")
    assert status == 0 and "going on with 2 finished parts" in err and "one" in out
    assert counting() == ["0", "1", "2", "3"]
    assert files("d") == files("whole") and not (cut / "unfinished").exists()
    seconds = json.loads((cut / "result.json").read_text())["wall_seconds"]
    assert 0.5 < seconds < 5  # with those of the parts that were there


def test_09_a_finished_run_is_shown_and_nothing_is_computed(capsys, counting):
    out = gradhpo(capsys, "--out", "d")[1]
    before = {path.name: path.stat().st_mtime_ns for path in Path("d").iterdir()}
    status, again, err = gradhpo(capsys, "--out", "d", "--resume")
    assert status == 0 and err == "" and "finished; nothing was computed" in again
    assert again.startswith(out.partition("\n\nwrote")[0]) and len(counting()) == 4
    assert {path.name: path.stat().st_mtime_ns for path in Path("d").iterdir()} == before


def test_09_a_run_that_was_cut_off_is_not_overwritten_in_silence(cut, capsys, counting):
    status, out, err = gradhpo(capsys, "--out", "d")
    assert (status, out, len(err.splitlines())) == (1, "", 1) and counting() == ["0", "1"]
    assert "counting that was cut off" in err and "--resume" in err and "--overwrite" in err
    assert gradhpo(capsys, "--out", "d", "--overwrite")[0] == 0
    assert counting()[2:] == ["0", "1", "2", "3"] and files("d") == files("whole")


def test_09_overwrite_takes_nothing_that_is_there(cut, capsys, counting, monkeypatch):
    """Parts of a run that was cut off, or whose last files could not be removed."""
    monkeypatch.setenv("STOP", "0")
    status, _, err = gradhpo(capsys, "--out", "d", "--overwrite")
    monkeypatch.delenv("STOP")
    assert status == 130 and "1 finished parts" in err and counting() == ["0", "1", "0"]
    (cut / "run.json").rename("run.json")
    status, _, err = gradhpo(capsys, "--out", "d")
    assert status == 1 and "run whose run.json is missing" in err and counting()[3:] == []
    shutil.copytree(cut / "unfinished", "whole/unfinished")
    status, _, err = gradhpo(capsys, "--out", "whole", "--overwrite")
    assert status == 0 and "damaged" not in err and counting()[3:] == ["0", "1", "2", "3"]


def test_09_a_command_that_cannot_run_removes_no_part(cut, capsys, counting, monkeypatch):
    def fails(config, progress):
        raise ValueError("no such data")

    before = {path: path.read_bytes() for path in cut.rglob("*.json")}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["counting_study"], "run", fails)
        with pytest.raises(ValueError, match="no such data"):
            gradhpo(capsys, "--out", "d", "--overwrite")
    assert {path: path.read_bytes() for path in cut.rglob("*.json")} == before
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0
    assert counting() == ["0", "1", "2", "3"] and files("d") == files("whole")


def test_16_a_part_of_another_run_is_computed_again(cut, capsys, counting, monkeypatch):
    monkeypatch.setenv("STOP", "1")
    gradhpo(capsys, "--out", "e")
    monkeypatch.delenv("STOP")
    for part in (cut / "unfinished").glob("seed_0*.json"):
        shutil.copy(part, "e/unfinished")
    status, _, err = gradhpo(capsys, "--out", "e", "--resume")
    assert status == 0 and "(it is a part of another run)" in err
    assert counting() == ["0", "1"] + ["0", "1"] + ["0", "2", "3"]


def test_16_commands_know_the_runs_of_others(capsys, tmp_path):
    Path("d").mkdir()
    run_record.begin(tmp_path / "d", run_record.Run("gradhpo tune", {"task": "m:t"}, seeds=1))
    status, _, err = gradhpo(capsys, "--out", "d", "--resume")
    assert status == 1 and "a run of gradhpo tune, not of gradhpo run counting" in err
    status, _, err = gradhpo(capsys, "--out", "d")
    assert status == 1 and "holds a run of gradhpo tune that was cut off" in err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rate", "0.2"], "another one, and runs do not mix: --rate: 0.1 -> 0.2."),
        (["--rate", "0.2", "--seeds", "7"], "--seeds: 5 -> 7; --rate: 0.1 -> 0.2."),
    ],
    ids=["one", "two"],
)
@pytest.mark.parametrize("which", ["d", "whole"])
def test_16_other_settings_are_refused(which, options, words, cut, capsys, counting):
    status, out, err = gradhpo(capsys, "--out", which, "--resume", *options)
    assert (status, out, len(err.splitlines())) == (1, "", 1) and words in err
    assert counting() == ["0", "1"]
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0  # nothing was lost by asking


def test_16_another_study_is_refused(cut, capsys, monkeypatch):
    monkeypatch.setitem(registry.STUDIES, "other", registry.STUDIES["counting"])
    assert cli.main(["run", "other", "--out", "d", "--resume"]) == 1
    assert (
        "holds a run of gradhpo run counting, not of gradhpo run other" in capsys.readouterr().err
    )


def test_09_without_a_run_there_is_nothing_to_go_on_with(capsys, counting):
    status, out, err = gradhpo(capsys, "--out", "d", "--resume")
    assert (status, out) == (1, "") and "holds no run to go on with" in err and counting() == []
    assert gradhpo(capsys, "--out", "d")[0] == 0
    with pytest.raises(SystemExit, match="2"):
        gradhpo(capsys, "--out", "d", "--resume", "--overwrite")
    assert "give one of them" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_09_a_run_that_failed_before_its_first_part_leaves_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["counting_study"], "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradhpo(capsys, "--out", "d")
    assert not os.listdir("d")


def test_17_another_environment_is_told(cut, capsys, monkeypatch):
    now = provenance.versions()
    monkeypatch.setattr(parts, "versions", lambda: {**now, "jax": "9.9"})
    status, _, err = gradhpo(capsys, "--out", "d", "--resume")
    assert status == 0 and f"jax: {now['jax']} -> 9.9" in err and "last bits" in err


def test_04_a_damaged_part_is_told_and_computed_again(cut, capsys, counting):
    first, second = sorted((cut / "unfinished").glob("seed*.json"))
    content = first.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"[" * 100_000, b"\xff"):
        first.write_bytes(damaged)
        Path("counted.txt").write_text("")
        os.environ["STOP"] = "1"
        status, _, err = gradhpo(capsys, "--out", "d", "--resume")
        del os.environ["STOP"]
        assert status == 130 and re.search(r"seed_0-\w+\.json is damaged", err)
        assert counting() == ["0"] and first.read_bytes() != damaged
    first.write_bytes(second.read_bytes())  # intact, and of another part
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0
    assert counting() == ["0", "0", "2", "3"] and files("d") == files("whole")


def test_05_no_flipped_bit_goes_unseen(cut, capsys):
    """One in every byte, where the part can still be read as JSON; the rest is test_04's."""
    path, _ = sorted((cut / "unfinished").glob("seed*.json"))
    content, told, run = path.read_bytes(), [], run_record.read(cut)
    kept = parts.Parts(cut, run, told.append, resume=True)
    want = kept.once("seed 0", lambda: 1 / 0, ())
    rng = np.random.default_rng(0)
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        told.clear()
        kept = parts.Parts(cut, run, told.append, resume=True)
        got = kept.once("seed 0", lambda: np.zeros(3), ())
        # Among the spaces between the words, and in names of keys that do not count, none matters.
        assert np.array_equal(got, want) or told, i


def test_06_a_damaged_note_of_the_run_is_refused(cut, capsys, counting):
    (cut / "run.json").write_text('{"study": "counting"')
    status, out, err = gradhpo(capsys, "--out", "d", "--resume")
    assert (status, out) == (1, "") and "run.json is damaged" in err and "--overwrite" in err
    assert counting() == ["0", "1"]


def test_07_a_disk_that_is_full_costs_one_part(cut, capsys, counting, monkeypatch):
    publish = parts.publish

    def full(path, make):
        if "seed_3" in path.name:
            raise OSError(28, "No space left on device", str(path))
        publish(path, make)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "publish", full)
        status, out, err = gradhpo(capsys, "--out", "d", "--resume")
    assert (status, out) == (1, "") and "3 finished parts are kept" in err
    assert "No space left on device" in err.splitlines()[-1]
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0
    assert counting() == ["0", "1", "2", "3", "3"] and files("d") == files("whole")


def start(*options, seconds):
    environment = {**os.environ, "PART_SECONDS": str(seconds)}
    environment["PYTHONPATH"] = str(Path(cli.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), "run", "counting", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_10_a_second_process_in_the_directory_is_refused(cut, capsys, counting):
    """By the lock of the first, at once; whatever it was to do there."""
    from gradhpo.checkpoint.lock import only_writer

    with only_writer(cut):
        for option in ("--resume", "--overwrite"):
            status, out, err = gradhpo(capsys, "--out", "d", option)
            assert (status, out, len(err.splitlines())) == (1, "", 1)
            assert f"process {os.getpid()} on " in err and "since" in err
    assert counting() == ["0", "1"]
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0  # nothing was lost
    assert files("d") == files("whole")


def test_10_a_command_that_ended_meanwhile_is_seen(cut, monkeypatch):
    """Another one has overwritten the run between the first look and the lock."""
    tried, asked = run_directory._tried, run_record.read(cut)

    def meanwhile(path):
        other = replace(asked, id="f" * 16, settings=asked.settings | {"parts": 9})
        run_record.finish(cut, other, [])
        return tried(path)

    monkeypatch.setattr(run_directory, "_tried", meanwhile)
    how = {"overwrite": False, "resume": True}
    with pytest.raises(ValueError, match="runs do not mix: --parts"):
        with run_directory.held(cut, asked, "unfinished", lambda: False, **how):
            pass


def test_09_a_file_where_parts_are_kept_is_told_before_any_is_computed(capsys, counting):
    Path("d").mkdir()
    Path("d/unfinished").write_text("mine")
    status, _, err = gradhpo(capsys, "--out", "d")
    assert status == 1 and "d/unfinished is a file: remove it" in err and counting() == []


def test_09_files_of_others_stay(cut, capsys):
    for name in ("novel.txt", "notes.json"):
        (cut / "unfinished" / name).write_text("mine")
    (cut / "unfinished" / ".7.seed_0-0123abcd.json").touch()  # cut off
    assert gradhpo(capsys, "--out", "d", "--resume")[0] == 0
    left = {path.name for path in (cut / "unfinished").iterdir()}
    assert left == {"novel.txt", "notes.json"}


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    "sent, status, said",
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGTERM, 143, "gradhpo: terminated"),
        (signal.SIGINT, 130, "gradhpo: interrupted"),
    ],
    ids=["01 killed", "15 terminated", "14 interrupted"],
)
def test_01_14_15_a_signal_costs_the_part_that_was_on(sent, status, said, capsys, counting):
    assert gradhpo(capsys, "--out", "whole")[0] == 0
    Path("counted.txt").write_text("")
    process = start("--out", "d", seconds=1)
    try:
        wait_for(lambda: len(counting()) == 3)
        process.send_signal(sent)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == status and (err.splitlines() or [""])[-1].startswith(said)
    assert len(list(Path("d/unfinished").glob("seed*.json"))) == 2
    status, _, err = gradhpo(capsys, "--out", "d", "--resume")
    assert status == 0 and counting() == ["0", "1", "2", "2", "3"]
    assert files("d") == files("whole")
