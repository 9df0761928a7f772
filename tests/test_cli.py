"""The command line, on a study that takes no time: what it prints, writes and returns."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import pytest

from gradhpo import cli, datasets
from gradhpo.report import StudyResult, output_directory, read, summarize, write
from gradhpo.report.config import DataStudyConfig, StudyConfig, silent
from gradhpo.studies import registry
from gradhpo.studies.registry import Study

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")


@dataclasses.dataclass(frozen=True)
class Config(DataStudyConfig):
    """A study of nothing."""

    baselines = ("fixed",)

    out: Path = Path("results/toy")
    dataset: str = "digits"
    rate: float = 0.1
    """The learning rate at the start."""
    problem: str = ""
    """What goes wrong."""


@dataclasses.dataclass(frozen=True)
class DemoConfig(Config):
    """The same, elsewhere."""

    out: Path = Path("out/demo")


def throw(error):
    raise error


REGISTERED = dict(registry.STUDIES)
PROBLEMS = {
    "data": lambda: throw(datasets.DatasetError("mnist holds no\n\x1b[31mtrain.bin")),
    "value": lambda: datasets.gaussian_clusters(num_train=0),
    "file": lambda: throw(FileNotFoundError(2, "No such file or directory", "train.bin")),
    "extra": lambda: datasets.digits(),
    "interrupt": lambda: throw(KeyboardInterrupt),
    "bug": lambda: 1 / 0,
    "bug in Python": lambda: int("many"),
    "bug in JAX": lambda: jnp.ones(2) + jnp.ones(3),
    "bug in an import": lambda: throw(ImportError("cannot import name 'x'")),
}
FULL = OSError(errno.ENOSPC, "No space left on device")


def run(config, progress=silent):
    PROBLEMS.get(config.problem, int)()
    progress(f"{config.seeds} seeds of \x1b[31m {config.dataset}")
    losses = {name: {"val_loss": [1.0 + i] * config.seeds} for i, name in enumerate(config.method)}
    failures = {"full disk": lambda path: throw(FULL), "figure": lambda path: 1 / 0}
    draw = lambda path: path.write_bytes(b"png")  # noqa: E731
    files = {"figure.png": failures.get(config.problem, draw), "other.png": draw}
    return StudyResult("toy", config, summarize(losses), wall_seconds=0.1, files=files)


def demo(config, command):
    print(f"seeds: {config.seeds}")
    write(StudyResult("tutorial", config, {}, wall_seconds=0.1, command=command), config.out)
    print("demo: compute 0.1 s")


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """Registers the study and two methods, and starts in an empty directory."""
    study = ModuleType("toy_study")
    vars(study).update(Config=Config, DemoConfig=DemoConfig, run=run, demo=demo)
    study.separated = lambda config: dataclasses.replace(config, out=config.out / "separated")
    methods = ModuleType("methods")
    entry = SimpleNamespace(description="looks one step ahead")
    vars(methods).update(METHODS={"one_step": entry, "t1t2": entry})
    monkeypatch.setitem(sys.modules, "toy_study", study)
    monkeypatch.setitem(sys.modules, "gradhpo.algorithms.registry", methods)
    studies = {name: Study("toy_study", "a study of nothing") for name in ("toy", "tutorial")}
    monkeypatch.setattr(registry, "STUDIES", studies)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADHPO_TRACEBACK", raising=False)


def gradhpo(capsys, *arguments):
    """Exit status, stdout and stderr of one command."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_run_prints_the_table_and_then_the_files(capsys):
    arguments = ["run", "toy", "--out", "a b", "--seeds", "3", "--method", "one_step", "fixed"]
    status, out, err = gradhpo(capsys, *arguments)
    assert (status, err) == (0, "3 seeds of \\x1b[31m digits\n")
    lines = out.splitlines()
    assert lines[0] == "toy: mean and 95 % interval over 3 seeds"
    names = ["result.json", "curves.csv", "figure.png", "other.png"]
    assert lines[-4:] == [f"wrote {Path.cwd() / 'a b' / name}" for name in names]
    data = json.loads(Path("a b/result.json").read_text())
    assert data["command"] == "gradhpo run toy --out 'a b' --seeds 3 --method one_step fixed"
    assert data["settings"] == {
        "out": "a b",
        "overwrite": False,
        "resume": False,
        "seeds": 3,
        "fast": False,
        "method": ["one_step", "fixed"],
        "dataset": "digits",
        "data_dir": None,
        "rate": 0.1,
        "problem": "",
    }
    status, again, err = gradhpo(capsys, "report", "a b")
    assert (status, err) == (0, "")
    assert out.startswith(again)


def test_every_setting_is_an_option_with_its_help(capsys):
    status, out, _ = gradhpo(capsys, "run", "toy", "--help")
    assert status == 0
    for words in ("--out", "--seeds", "--fast", "--method", "--dataset", "--data-dir", "--rate",
                  "Number of repetitions", "The learning rate at the start", "digits"):  # fmt: skip
        assert words in out
    assert "--no-fast" not in out and "--baselines" not in out


def test_options_reach_the_study(capsys):
    options = ["--fast", "--dataset", "mnist", "--data-dir", "d", "--rate", "0.5", "--seeds", "1"]
    assert gradhpo(capsys, "run", "toy", "--method", "t1t2", *options)[0] == 0
    settings = json.loads(Path("results/toy/result.json").read_text())["settings"]
    assert (settings["fast"], settings["dataset"], settings["data_dir"]) == (True, "mnist", "d")
    assert (settings["rate"], settings["seeds"], settings["method"]) == (0.5, 1, ["t1t2"])


def test_demo_has_the_last_word(capsys):
    status, out, _ = gradhpo(capsys, "demo", "--out", "d", "--seeds", "2")
    assert (status, out) == (0, "seeds: 2\ndemo: compute 0.1 s\n")
    assert read("d").command == "gradhpo demo --out d --seeds 2"


def test_demo_replaces_the_results_of_a_demo_and_of_nothing_else(capsys):
    assert gradhpo(capsys, "demo")[0] == 0
    status, out, _ = gradhpo(capsys, "demo", "--seeds", "2")
    said = f"replacing the results of an earlier demo in {Path('out/demo')}"
    assert status == 0 and out.splitlines()[:2] == [said, "seeds: 2"]
    assert gradhpo(capsys, "run", "toy", "--out", "out/demo", "--overwrite")[0] == 0
    status, out, err = gradhpo(capsys, "demo")
    assert (status, out) == (1, "") and "holds results already" in err
    assert gradhpo(capsys, "demo", "--out", "d")[0] == 0
    assert gradhpo(capsys, "demo", "--out", "d")[0] == 1  # a directory that was chosen
    assert gradhpo(capsys, "demo", "--out", "d", "--overwrite")[0] == 0
    assert gradhpo(capsys, "run", "toy", "--out", "e/separated")[0] == 0
    assert gradhpo(capsys, "demo", "--out", "e")[0] == 1  # the demo's second setting goes there


def test_list_has_a_line_for_everything(capsys):
    assert gradhpo(capsys, "list") == (
        0,
        "studies:\n  toy       a study of nothing\n  tutorial  a study of nothing\n"
        "methods:\n  one_step  looks one step ahead\n  t1t2      looks one step ahead\n",
        "",
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["no command", "usage: gradhpo COMMAND"]),
        (["runs"], ["unknown command 'runs'", "usage: gradhpo COMMAND"]),
        (["run"], ["no study; the studies are: toy, tutorial"]),
        (["run", "toys\x1b[31m"], [r"unknown study 'toys\x1b[31m'", "are: toy, tutorial"]),
        (["report"], ["usage: gradhpo report DIR"]),
        (["report", "a", "b"], ["usage: gradhpo report DIR"]),
        (["list", "all"], ["takes no arguments"]),
        (["run", "toy", "--sedes", "3"], ["--sedes"]),
        (["run", "toy", "--seeds", "many"], ["many"]),
        (["run", "toy", "--seeds", "0"], ["seeds must be at least 1"]),
        (["run", "toy", "--method", "t2t1"], ["'t2t1'", "fixed, one_step, t1t2"]),
        (["run", "toy", "--method", "t1t2", "t1t2"], ["named twice"]),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(arguments, words, capsys):
    status, out, err = gradhpo(capsys, *arguments)
    unwrapped = " ".join(err.replace("│", " ").split())
    assert (status, out) == (2, "")
    assert all(word in unwrapped for word in words)
    assert "Traceback" not in err and "\x1b[31m" not in err
    assert not os.listdir()  # nothing was created


@pytest.mark.parametrize(
    "problem, status, message",
    [
        ("data", 1, r"gradhpo: error: mnist holds no \x1b[31mtrain.bin"),
        ("value", 1, "gradhpo: error: Sizes must be positive, got (0, 256, 8, 4)."),
        ("file", 1, "gradhpo: error: [Errno 2] No such file or directory: 'train.bin'"),
        (
            "extra",
            2,
            "gradhpo: error: This data set needs sklearn. In a checkout of gradhpo run: "
            'pip install ".[data]"',
        ),
        ("interrupt", 130, "gradhpo: interrupted"),
    ],
)
def test_a_failure_is_one_line(problem, status, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arguments = ("run", "toy", "--problem", problem)
    assert gradhpo(capsys, *arguments) == (status, "", message + "\n")
    if status != 130:
        monkeypatch.setenv("GRADHPO_TRACEBACK", "1")
        with pytest.raises((datasets.DatasetError, OSError, ImportError, ValueError)):
            cli.main(arguments)


@pytest.mark.parametrize(
    "problem, error",
    [
        ("bug", ZeroDivisionError),
        ("bug in Python", ValueError),
        ("bug in JAX", (TypeError, ValueError)),
        ("bug in an import", ImportError),
    ],
)
def test_a_bug_keeps_its_traceback(problem, error):
    with pytest.raises(error):
        cli.main(["run", "toy", "--problem", problem])


@pytest.mark.parametrize("file", ["result.json", "accuracy.png", "table.csv"])
def test_results_are_not_overwritten_unasked(file, capsys):
    Path("d").mkdir()
    Path("d", "notes.txt").write_text("not ours, and in nobody's way")
    assert gradhpo(capsys, "run", "toy", "--out", "d", "--fast")[0] == 0
    for result in Path("d").iterdir():
        result.unlink()
    Path("d", file).write_text("precious")
    status, out, err = gradhpo(capsys, "run", "toy", "--out", "d", "--problem", "bug")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert file in err and "--out" in err and "--overwrite" in err
    assert Path("d", file).read_text() == "precious"
    assert gradhpo(capsys, "run", "toy", "--out", "d", "--overwrite")[0] == 0
    assert read("d").study == "toy"


def test_without_matplotlib_no_study_begins(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = gradhpo(capsys, "run", "toy", "--problem", "bug")
    assert (status, out) == (2, "") and 'Matplotlib: pip install ".[plot]"' in err
    assert not os.listdir()


def test_on_a_full_disk_no_study_begins(capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: throw(FULL))
    status, out, err = gradhpo(capsys, "run", "toy", "--problem", "bug")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "No space left on device. Choose another directory with --out, with 16 MB" in err


@pytest.mark.parametrize("problem", ["full disk", "figure"])
def test_a_figure_that_fails_costs_neither_table_nor_files(problem, capsys):
    """It was drawn before the table was printed and the result written."""
    arguments = ["run", "toy", "--out", "d", "--method", "t1t2", "--problem", problem]
    if problem == "figure":  # a bug
        with pytest.raises(ZeroDivisionError):
            cli.main(arguments)
        out = capsys.readouterr().out
    else:
        status, out, err = gradhpo(capsys, *arguments)
        path = Path.cwd() / "d" / "figure.png"
        message = f"gradhpo: error: [Errno 28] No space left on device: {str(path)!r}"
        assert (status, err.splitlines()[1:]) == (1, [message])
    assert out.splitlines()[4].startswith("t1t2  ")
    saved = ["result.json", "curves.csv", "other.png"]
    assert out.splitlines()[-3:] == [f"wrote {Path.cwd() / 'd' / name}" for name in saved]
    assert sorted(os.listdir("d")) == sorted(saved) and read("d").study == "toy"


def test_a_disk_that_is_full_in_the_end_costs_no_table(capsys, monkeypatch):
    fsync, calls = os.fsync, []

    def before(descriptor):  # the test before the study finds room
        calls.append(descriptor)
        return fsync(descriptor) if len(calls) <= 1 else throw(FULL)

    monkeypatch.setattr(os, "fsync", before)
    status, out, err = gradhpo(capsys, "run", "toy", "--out", "d", "--method", "t1t2")
    assert status == 1 and "t1t2" in out and "wrote" not in out
    assert "No space left on device: " in err and "result.json" in err and not os.listdir("d")


def test_a_closed_pipe_costs_no_file(monkeypatch):
    def closed(*values, file=None, **settings):
        if file is None:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert cli.main(["run", "toy", "--out", "d"]) == 1
    sys.stdout.close()  # what `main` has put there
    assert {"result.json", "curves.csv", "figure.png", "other.png"} == set(os.listdir("d"))


STUCK = """
import hashlib, signal, sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from gradhpo import cli
from gradhpo.studies import registry
from gradhpo.report.config import StudyConfig

def run(config, progress):
    print("begun", flush=True)
    stuck = hashlib.pbkdf2_hmac, "sha256", b"", b"", 10**9  # like compiled code: for minutes
    if config.fast:
        with ThreadPoolExecutor() as pool:
            pool.submit(*stuck)
    stuck[0](*stuck[1:])

sys.modules["stuck"] = study = ModuleType("stuck")
study.Config, study.run = StudyConfig, run
registry.STUDIES["stuck"] = registry.Study("stuck", "")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.argv[1:1] = ["run", "stuck"]
sys.exit(cli.main())  # as the installed command does; a caller with a list keeps its process
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process alone")
@pytest.mark.parametrize(
    "options, sent, status, said",
    [
        ([], signal.SIGINT, 130, "interrupted"),
        (["--fast"], signal.SIGINT, 130, "interrupted"),
        ([], signal.SIGTERM, 143, "terminated"),
    ],
    ids=["main thread", "pool", "terminated"],
)
def test_a_signal_ends_a_call_that_python_cannot(options, sent, status, said):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *options],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # into the call
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)  # takes 1 s where nothing else runs
        assert (process.returncode, err) == (status, f"gradhpo: {said}\n")
    finally:
        process.kill()


def test_the_handling_of_signals_is_left_as_it_was(capsys):
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    assert gradhpo(capsys, "list")[0] == 0
    assert signal.set_wakeup_fd(-1) == -1
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("command", [["run", "toy"], ["demo"]], ids=" ".join)
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_bad_output_path_is_found_before_the_work(command, out, capsys):
    Path("file").write_text("precious")
    status, shown, err = gradhpo(capsys, *command, "--out", out, *["--problem", "bug"])
    assert (status, shown) == (1, "") and "is, or lies below, a file" in err
    assert Path("file").read_text() == "precious"


def test_a_directory_that_cannot_be_written_to_is_refused(monkeypatch, tmp_path):
    def read_only(dir):
        raise PermissionError(13, "Permission denied", str(dir / "tmp1"))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(PermissionError, match="cannot write to .*Permission denied"):
        output_directory(tmp_path)


def test_report_without_a_result(capsys, tmp_path):
    status, out, err = gradhpo(capsys, "report", "nowhere")
    assert (status, out) == (1, "") and "no result.json in nowhere" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["demo"], ["list"], ["run", "toy"], ["report", "a"], []])
def test_without_the_extra_the_command_to_install_it(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, out, err = gradhpo(capsys, *command)
    assert (status, out) == (2, "") and 'pip install ".[cli]"' in err


def test_help_and_version(capsys):
    import gradhpo as package

    assert gradhpo(capsys, "--version") == (0, f"gradhpo {package.__version__}\n", "")
    assert gradhpo(capsys, "--help") == (0, cli.USAGE + "\n", "")
    assert gradhpo(capsys, "run", "--help") == (0, cli.USAGE + "\n", "")


def test_registered_studies_are_described():
    assert {"tutorial", "hyper_cleaning", "regularisation"} <= set(REGISTERED)
    assert all(0 < len(study.description) < 95 for study in REGISTERED.values())
    with pytest.raises(ValueError, match="unknown study 'x'; known: toy, tutorial"):
        registry.load("x")


def test_settings_are_frozen_and_need_no_method():
    config = StudyConfig()
    assert config.method == () and "t1t2" in config.known_methods()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seeds = 3


def test_as_a_program_whose_reader_has_left():
    """As in `gradhpo list | head -1`: no traceback, not even at exit."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gradhpo.cli", "--version"],
        cwd=Path(cli.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1
