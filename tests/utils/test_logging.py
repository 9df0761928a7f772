"""Loggers: what they write, and that nothing which happens to their target stops training."""

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo.utils import logging
from gradhpo.utils.logging import (
    CSVLogger,
    JSONLinesLogger,
    MetricLogger,
    MultiLogger,
    ProgressLogger,
    TensorBoardLogger,
    log_callback,
)

FILES = pytest.mark.parametrize("kind", [JSONLinesLogger, CSVLogger])


class Memory:
    """The smallest logger there is."""

    def __init__(self):
        self.seen, self.closed = [], 0

    def log(self, metrics, step):
        self.seen.append((step, dict(metrics)))

    def close(self):
        self.closed += 1


def read_json_lines(path):
    def reject(token):
        raise AssertionError(f"{token} is not strict JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def test_json_lines_hold_every_kind_of_number(tmp_path):
    path = tmp_path / "a b" / "ü" / "metrics.jsonl"
    with JSONLinesLogger(path) as logger:
        logger.log({"a": 1, "b": jnp.float32(0.5), "c": np.float64(2), "d": jnp.ones((1,))}, step=1)
        logger.log({"a": float("nan"), "b": -np.inf, "c": True}, step=jnp.int32(2))
    assert read_json_lines(path) == [
        {"step": 1, "a": 1.0, "b": 0.5, "c": 2.0, "d": 1.0},
        {"step": 2, "a": None, "b": None, "c": 1.0},
    ]


def test_csv_keeps_the_columns_of_its_first_record(tmp_path):
    path = tmp_path / "metrics.csv"
    with CSVLogger(path) as logger:
        logger.log({"a": 1.5, "b,c": 2}, step=1)
        with pytest.warns(RuntimeWarning, match="no column for d") as warned:
            logger.log({"a": 3, "d": 4}, step=2)
            logger.log({"d": 4, "b,c": float("nan")}, step=3)
    assert len(warned) == 1
    with CSVLogger(path) as logger:  # a second run continues the file
        logger.log({"b,c": 7.0, "a": 6.0}, step=4)
    assert list(csv.reader(path.read_text().splitlines())) == [
        ["step", "a", "b,c"],
        ["1", "1.5", "2.0"],
        ["2", "3.0", ""],
        ["3", "", "nan"],
        ["4", "6.0", "7.0"],
    ]


def test_csv_refuses_to_continue_another_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("name,age\n")
    with pytest.raises(ValueError, match="no column `step`"):
        CSVLogger(path)
    assert path.read_text() == "name,age\n"


def test_a_line_cut_short_by_a_kill_spoils_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "val')
    with JSONLinesLogger(path) as logger:
        logger.log({"a": 1.0}, step=3)
    lines = path.read_text().splitlines()
    assert (lines[0], lines[2]) == ('{"step": 1}', '{"step": 3, "a": 1.0}')


@FILES
def test_a_directory_is_refused_at_once(kind, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory"):
        kind(tmp_path)


@FILES
def test_a_relative_path_does_not_move_with_the_process(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with kind("metrics.log") as logger:
        monkeypatch.chdir(tmp_path / "elsewhere")
        logger.log({"a": 1.0}, step=1)
    assert logger.path == tmp_path / "metrics.log"
    assert logger.path.read_text() and not os.listdir(tmp_path / "elsewhere")


@FILES
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_warns_once_and_keeps_the_records(kind):
    with kind("/dev/full") as logger:
        with pytest.warns(RuntimeWarning, match=r"No space left.*logger\.records") as warned:
            for step in range(1, 4):
                logger.log({"a": step}, step)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert logger.records == [{"step": s, "a": float(s)} for s in (1, 2, 3)]


@FILES
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_broken_pipe_warns_once_and_keeps_the_records(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []

    def read_a_little():
        with open(tmp_path / "pipe", "rb") as reader:
            received.append(reader.readline())

    reader = threading.Thread(target=read_a_little)
    reader.start()
    logger = kind(tmp_path / "pipe")
    logger.log({"a": 1}, step=1)
    reader.join(timeout=60)
    assert b"step" in received[0]
    with pytest.warns(RuntimeWarning, match="Broken pipe") as warned:
        logger.log({"a": 2}, step=2)
        logger.log({"a": 3}, step=3)
        logger.close()
    assert len(warned) == 1
    assert [record["step"] for record in logger.records] == [2, 3]


def test_a_record_that_does_not_fit_leaves_no_half_line(tmp_path, monkeypatch):
    logger = JSONLinesLogger(tmp_path / "metrics.jsonl")
    logger.log({"a": 1}, step=1)

    class NearlyFull:
        """Takes five bytes, then the disk is full."""

        def __init__(self, file):
            self.file, self.calls = file, 0
            self.fileno, self.close = file.fileno, file.close

        def write(self, data):
            self.calls += 1
            if self.calls == 1:
                return self.file.write(data[:5])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger, "_file", NearlyFull(logger._file))
    with pytest.warns(RuntimeWarning, match="No space left"):
        logger.log({"a": 2}, step=2)
    logger.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_control_characters_never_reach_a_file_or_a_terminal(tmp_path, capsys):
    key = "loss\x1b[31m\r\n\x9b\u202e"
    shown = r"loss\x1b[31m\r\n\x9b\u202e"
    with (
        JSONLinesLogger(tmp_path / "a") as lines,
        CSVLogger(tmp_path / "b") as table,
        ProgressLogger() as progress,
    ):
        MultiLogger(lines, table, progress).log({key: 1.0}, step=1)
    assert shown in read_json_lines(tmp_path / "a")[0]
    assert (tmp_path / "b").read_text() == f"step,{shown}\n1,1.0\n"
    assert capsys.readouterr().err == f"step 1 {shown}=1\n"


@pytest.mark.parametrize(
    "value", [[1.0, 2.0], [[1], [1, 2]], "0.5", None, 1j, np.zeros(0)], ids=repr
)
def test_what_is_not_a_number_is_named(value, tmp_path):
    with JSONLinesLogger(tmp_path / "a") as logger:
        with pytest.raises(TypeError, match="metric 'weights' needs a number"):
            logger.log({"weights": value}, step=1)


def test_misuse_is_explained(tmp_path):
    logger = JSONLinesLogger(tmp_path / "a")
    with pytest.raises(ValueError, match="rename the metric"):
        logger.log({"step": 1.0}, step=1)
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="closed"):
        logger.log({}, step=1)


def test_tensorboard_events_can_be_read_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with TensorBoardLogger(tmp_path / "logs") as logger, TensorBoardLogger(tmp_path / "logs"):
        logger.log({"val_loss": jnp.float32(0.5), "nan": float("nan")}, step=7)
    assert len(list((tmp_path / "logs").iterdir())) == 2  # one file for each logger
    data = b"".join(sorted((p.read_bytes() for p in (tmp_path / "logs").iterdir()), key=len))
    events = []
    while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [event.step for event in events] == [0, 0, 7]
    values = {value.tag: value.simple_value for value in events[-1].summary.value}
    assert values["val_loss"] == 0.5 and np.isnan(values["nan"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_tensorboard_survives_a_full_disk(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb"))
    with pytest.warns(RuntimeWarning, match="No space left") as warned:
        with TensorBoardLogger(tmp_path) as logger:
            for step in range(100):
                logger.log({"a": step}, step)
    assert len(warned) == 1 and len(logger.records) == 100


def test_tensorboard_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[log\]"'):
        TensorBoardLogger(tmp_path)


def test_tensorboard_refuses_a_file(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        TensorBoardLogger(tmp_path / "file")


def test_progress_prints_first_last_and_now_and_then(capsys):
    with ProgressLogger(total=5, every=1000.0) as logger:
        for step in range(1, 6):
            logger.log({"norm": 3.0, "val_loss": 1 / step}, step)
    shown = "step 1/5 val_loss=1 norm=3\nstep 5/5 val_loss=0.2 norm=3\n"  # the loss comes first
    assert capsys.readouterr().err == shown
    with ProgressLogger(every=0.0) as logger:
        for step in range(1, 4):
            logger.log({}, step)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_progress_disabled_is_silent(capsys):
    with ProgressLogger(total=1, every=0.0, disable=True) as logger:
        logger.log({"val_loss": 1.0}, step=1)
    assert capsys.readouterr() == ("", "")


def test_progress_without_stderr_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressLogger() as logger:
        logger.log({"val_loss": 1.0}, step=1)


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressLogger(total=10) as logger:
        logger.log({"val_loss": 0.5}, step=4)
    assert "4/10" in (shown := capsys.readouterr().err) and "val_loss=0.5" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with ProgressLogger(total=10) as logger:
        logger.log({"val_loss": 0.5}, step=4)
    assert capsys.readouterr().err == "step 4/10 val_loss=0.5\n"


def test_multi_logger_feeds_and_closes_all():
    first, second = Memory(), Memory()
    broken = SimpleNamespace(log=lambda metrics, step: None, close=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with MultiLogger(first, broken, second) as logger:
            logger.log({"a": 1}, step=1)
    assert first.seen == second.seen == [(1, {"a": 1})]
    assert (first.closed, second.closed) == (1, 1)
    assert isinstance(logger, MetricLogger) and isinstance(first, MetricLogger)


def test_log_callback_logs_the_numbers_of_the_metadata():
    memory = Memory()
    metadata = {
        "val_loss": jnp.float32(0.5),
        "status": jnp.int32(-1),
        "rate": jnp.bfloat16(0.25),
        "users_key": jax.random.key(0),
        "users_array": jnp.zeros(3),
        "users_text": "0.5",
    }
    callback = log_callback(memory, every=2)
    for episode in range(1, 5):
        callback(episode, SimpleNamespace(metadata=metadata))
    assert memory.seen == [(e, {"val_loss": 0.5, "status": -1.0, "rate": 0.25}) for e in (2, 4)]
    assert all(type(value) is float for value in memory.seen[0][1].values())
    with pytest.raises(ValueError, match="at least 1"):
        log_callback(memory, every=0)


def test_everything_listed_exists():
    assert all(hasattr(logging, name) for name in logging.__all__)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell pipe")
def test_progress_survives_a_closed_stderr():
    """The reader of stderr goes away while a process logs; the process ends well."""
    code = (
        "import sys, time\n"
        "from gradhpo.utils._progress import ProgressLogger\n"
        "sys.stdin.readline()\n"
        "with ProgressLogger(every=0.0) as logger:\n"
        "    for step in range(3): logger.log({'a': 1.0}, step)\n"
        "print(len(logger.records))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(logging.__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stderr.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stdout.read() == "3\n"
    process.stdout.close()
    process.wait(timeout=60)
