"""`gradhpo tune` that is killed, interrupted, terminated, and resumed with other settings.

Its files after an interrupt within or between trainings: tests/tuning/test_commands_resumed.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradhpo import cli
from gradhpo.report import run_record

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("filelock")

TASK = """
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam["decay"] * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


PROBLEM = gh.BilevelProblem(gh.from_optax(loss, lambda lam: optax.sgd(lam["rate"], 0.5)), judge)


def task(seed=0):
    data = np.random.default_rng(seed).normal(2.0, 1.0, (40, 3)).astype(np.float32)
    return gh.Task(
        PROBLEM,
        np.zeros(3, np.float32),
        {"decay": np.float32(1.0), "rate": np.float32(0.05)},
        train=gh.Resident(data[:20], 5, seed=seed),
        val=gh.Resident(data[20:], 8, seed=seed + 1),
        space=gh.spaces.log(),
    )
"""
OFTEN = """
import signal
import sys
from gradhpo import cli
from gradhpo.tuning import places

places.EVERY = 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
sys.exit(cli.main())
"""
LONG = ("--steps", "40000", "--episodes", "100", "--alone")  # of about a second an episode


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text(TASK)
    return tmp_path


def start(*options):
    command = [sys.executable, "-c", OFTEN, "tune", "own_task:task", *options]
    with open("stderr", "w") as said:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)


def episodes(out):
    path = out / "checkpoints/seed0-tuned/episodes.jsonl"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [json.loads(line)["row"] for line in lines]


def written(out):
    """When something was last kept."""
    paths = (out / "checkpoints").glob("*/episodes.jsonl")
    return max((path.stat().st_mtime_ns for path in paths), default=0)


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(process, within):
    """The exit status and stderr of a process that ends by itself, and the seconds that it took."""
    began = time.monotonic()
    rc = process.wait(within)
    return rc, Path("stderr").read_text(), time.monotonic() - began


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
@pytest.mark.faults
def test_14_15_a_signal_ends_the_command_after_the_episode(here, number, status):
    process = start(*LONG, "--out", "a")
    wait_for(lambda: len(episodes(here / "a")) >= 2)
    process.send_signal(number)
    rc, err, seconds = ended(process, within=120)
    rows = episodes(here / "a")
    each = (rows[-1]["seconds"] - rows[0]["seconds"]) / (len(rows) - 1)
    assert rc == status and err.splitlines()[-1].split()[-1] in ("interrupted", "terminated")
    assert seconds < 2 * each + 20  # an episode, and drawing the figures
    state = here / f"a/checkpoints/seed0-tuned/step-{rows[-1]['step']:010d}"
    assert state.is_dir() and (here / "a/report.html").is_file()
    found = json.loads((here / "a/hyperparams.json").read_text())["seeds"]["0"]
    assert (found["ended"], found["episodes"]) == ("interrupted", len(rows))


@pytest.mark.slow
@pytest.mark.faults
def test_14_a_second_interrupt_stops_while_compiled_code_runs(here):
    """Episodes of half a minute; what was saved before is whole."""
    options = ("--steps", "2000000", *LONG[2:], "--out", "a")
    process = start(*options)
    wait_for(lambda: (here / "a/checkpoints").is_dir())
    wait_for(lambda: (here / "a/checkpoints/seed0-tuned/.gradhpo.holder").exists())
    time.sleep(10.0)  # to compile
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rc, err, seconds = ended(process, within=60)
    assert rc == 130 and seconds < 5 and err.splitlines()[-1] == "gradhpo: interrupted"


@pytest.mark.slow
@pytest.mark.faults
def test_15_a_termination_outside_of_a_training(here):
    """While the module of the task is imported."""
    (here / "own_task.py").write_text("open('imported', 'w'); import time; time.sleep(60)\n")
    process = start("--out", "a")
    wait_for((here / "imported").exists)
    process.send_signal(signal.SIGTERM)
    rc, err, seconds = ended(process, within=30)
    assert (rc, err) == (143, "gradhpo: terminated\n") and seconds < 5


@pytest.mark.slow
@pytest.mark.faults
def test_01_a_command_that_is_killed_time_and_again_ends_with_the_same_files(here):
    options = ("--episodes", "400", "--steps", "50")
    assert start(*options, "--out", "whole").wait() == 0
    draw, kills, resume = random.Random(0), 0, ()
    for _ in range(4):
        before = written(here / "cut")
        process = start(*options, "--out", "cut", *resume)
        wait_for(
            lambda before=before, process=process: (
                written(here / "cut") > before or process.poll() is not None
            )
        )
        time.sleep(draw.uniform(0.0, 0.7))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        resume = ("--resume",) if (here / "cut/run.json").exists() else ()
    assert kills >= 2
    assert start(*options, "--out", "cut", *resume).wait() == 0
    for name in ("seed0.csv", "seed0.jsonl", "hyperparams.json", "curves.csv"):
        assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--episodes", "3", "--episodes: 2 -> 3"),
        ("--steps", "4", "--steps: 5 -> 4"),
        ("--outer", "sgd", "--outer: adam -> sgd"),
        ("--outer-rate", "0.1", "--outer-rate: 0.02 -> 0.1"),
        ("--method", "t1t2", "--method: one_step -> t1t2"),
        ("--patience", "1", "--patience: 0 -> 1"),
        ("--set", "rate=0.1", "--set: [] -> ['rate=0.1']"),
    ],
)
def test_16_a_command_with_other_settings_is_refused(here, capsys, option, value, message):
    command = ["tune", "own_task:task", "--episodes", "2", "--steps", "5", "--out", "a", "--resume"]
    settings = {"task": "own_task:task", "episodes": 2, "steps": 5}  # others: by default
    (here / "a").mkdir()
    run_record.begin(here / "a", run_record.Run("gradhpo tune", settings, seeds=1))
    assert cli.main([*command, option, value]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_16_where_a_run_is_kept_and_shown_may_change(here, capsys):
    pytest.importorskip("tensorboardX")
    command = ["tune", "own_task:task", "--episodes", "2", "--steps", "5", "--alone", "--out"]
    assert cli.main([*command, "a"]) == 0
    os.rename("a", "b")
    assert cli.main([*command, "b", "--seeds", "2", "--tensorboard", "--resume"]) == 0
    assert "over 2 seeds" in capsys.readouterr().out
    assert sorted(Path("b/tensorboard").iterdir()) == [
        Path(f"b/tensorboard/seed{i}") for i in (0, 1)
    ]
