"""The command line, on a study that takes no time: what it prints, writes and returns."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gradhpo import cli
from gradhpo.experiments import registry
from gradhpo.experiments.registry import Study
from gradhpo.experiments.report import StudyResult, summarize
from gradhpo.experiments.study import DataStudyConfig, StudyConfig, output_directory, silent

pytest.importorskip("tyro")


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


REGISTERED = dict(registry.STUDIES)
PROBLEMS = {
    "value": ValueError("data_dir holds no\n\x1b[31mtrain.bin"),
    "file": FileNotFoundError(2, "No such file or directory", "train.bin"),
    "extra": ImportError('needs pooch: pip install ".[data]"'),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError(),
}


def run(config, progress=silent):
    if config.problem:
        raise PROBLEMS[config.problem]
    progress(f"{config.seeds} seeds of \x1b[31m {config.dataset}")
    (config.out / "figure.png").write_bytes(b"png")
    losses = {name: {"val_loss": [1.0 + i] * config.seeds} for i, name in enumerate(config.method)}
    return StudyResult("toy", config, summarize(losses), wall_seconds=0.1)


def demo(config):
    print(f"seeds: {config.seeds}")
    print("demo: compute 0.1 s")


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """Registers the study and two methods, and starts in an empty directory."""
    study = ModuleType("toy_study")
    vars(study).update(Config=Config, run=run, demo=demo)
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
    names = ["curves.csv", "figure.png", "result.json"]
    assert lines[-3:] == [f"wrote {Path.cwd() / 'a b' / name}" for name in names]
    data = json.loads(Path("a b/result.json").read_text())
    assert data["command"] == "gradhpo run toy --out 'a b' --seeds 3 --method one_step fixed"
    assert data["settings"] == {
        "out": "a b",
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
    assert Path("d").is_dir()


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
        ("value", 1, r"gradhpo: error: data_dir holds no \x1b[31mtrain.bin"),
        ("file", 1, "gradhpo: error: [Errno 2] No such file or directory: 'train.bin'"),
        ("extra", 1, 'gradhpo: error: needs pooch: pip install ".[data]"'),
        ("interrupt", 130, "gradhpo: interrupted"),
    ],
)
def test_a_failure_is_one_line(problem, status, message, capsys, monkeypatch):
    arguments = ("run", "toy", "--problem", problem)
    assert gradhpo(capsys, *arguments) == (status, "", message + "\n")
    if status == 1:
        monkeypatch.setenv("GRADHPO_TRACEBACK", "1")
        with pytest.raises(type(PROBLEMS[problem])):
            cli.main(arguments)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "toy", "--problem", "bug"])


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
