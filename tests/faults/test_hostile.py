"""Faults 61 to 70: what is meant to harm, and what must never happen unasked."""

import ast
import builtins
import gzip
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import gradhpo
from gradhpo import cli, datasets
from gradhpo.datasets import DatasetError, archives
from gradhpo.datasets.archives import read_members
from gradhpo.datasets.class_folders import decode_image
from gradhpo.datasets.idx import parse_idx
from gradhpo.datasets.sparse_text import parse_libsvm
from gradhpo.report import StudyResult, read, summarize, table, write
from gradhpo.tuning import load_hyperparams
from gradhpo.tuning.directory import clear, events
from gradhpo.utils.logging import CSVLogger, JSONLinesLogger, ProgressLogger

SOURCE = Path(gradhpo.__file__).parent
ROOT = Path(__file__).parents[2]
ESCAPE = "\x1b[31mred<script>alert(1)</script>"

TASK = """
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh

NAME = "\\x1b[31m$x^{$<script>alert(1)</script>"


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam[NAME] * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2), {NAME: jnp.abs(w).max()}


PROBLEM = gh.BilevelProblem(gh.from_optax(loss, optax.sgd(0.1)), judge)


def task(seed=0):
    data = np.random.default_rng(seed).normal(2.0, 1.0, (40, 3)).astype(np.float32)
    source = gh.Resident(data, 5, seed=seed)
    return gh.Task(PROBLEM, np.zeros(3, np.float32), {NAME: np.float32(1.0)}, source, source)
"""


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """`(directory, stdout, stderr)` of a `gradhpo tune` whose names are hostile."""
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    place, out, err = tmp_path_factory.mktemp("hostile"), io.StringIO(), io.StringIO()
    (place / "evil.py").write_text(TASK)
    options = ["--episodes", "2", "--steps", "2", "--out", "out"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(place)
        patch.setattr(sys, "path", [str(place), *sys.path])
        patch.setenv("SECRET_TOKEN", "token-of-nobody-4711")
        status = cli.main(["tune", "evil:task", *options])
    sys.modules.pop("evil")
    assert status == 0, err.getvalue()
    return place / "out", out.getvalue(), err.getvalue()


FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_61_nothing_in_the_package_executes_or_unpickles_what_it_reads():
    assert FORBIDDEN_CALLS <= set(vars(builtins))
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            bad = {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                bad |= {called} & FORBIDDEN_CALLS
                bad |= {each.arg for each in node.keywords if each.arg == "allow_pickle"}
            found += [f"{path.name}:{node.lineno}: {each}" for each in sorted(bad)]
    assert not found, "\n".join(found)
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["ruff"]["lint"]
    assert {"S301", "S307", "S506"} <= set(rules["select"])


def test_61_a_pickle_among_the_data_is_never_opened(tmp_path):
    harm = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "harmed").encode()
    (tmp_path / "cifar10").mkdir()
    for name in ("data_batch_1", "data_batch_1.bin", "batches.meta"):
        (tmp_path / "cifar10" / name).write_bytes(harm)
    with pytest.raises(DatasetError, match="not a multiple of 3073"):
        datasets.cifar10(tmp_path)
    assert not (tmp_path / "harmed").exists()


NAMES = [
    "../x.png",
    "/tmp/x.png",
    "a/b",
    "a\\b",
    "x\0.png",
    "x\n",
    "n" * 400,
    "CON",
    "nul.txt",
    ".",
]


@pytest.mark.parametrize("name", [*NAMES, "..", "", "x ", "C:x", "com1.png"])
def test_62_a_file_of_a_result_cannot_be_named_out_of_its_directory(name):
    with pytest.raises(ValueError, match="is no name for a file"):
        StudyResult("toy", {}, {}, wall_seconds=0.1, files={name: lambda path: None})


@pytest.mark.parametrize("task", ["../x:task", "/etc/x:task", "..x:task", "a\\b:task", "x:a/b"])
def test_62_a_task_cannot_be_named_out_of_the_search_path(task, capsys):
    pytest.importorskip("tyro")
    assert cli.main(["tune", task]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out"])
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_63_members_that_lead_out_of_an_archive_are_refused(tmp_path, kind, name, link):
    path = tmp_path / "in" / "archive"
    path.parent.mkdir()
    name = "data_batch_1.bin" if link else name
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE if link else tarfile.REGTYPE), "/etc/passwd"
            archive.addfile(info)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (0o120777 if link else 0o100600) << 16
            archive.writestr(info, "/etc/passwd")
    with pytest.raises(DatasetError, match="outside of the archive|link or not a plain file"):
        list(read_members(path, lambda member: True))
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "archive"]


def test_63_nothing_but_our_own_reader_unpacks():
    """Pooch's `Untar` writes what an archive says on Python 3.11; `extractall` would too."""
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    assert not re.search(r"extractall|\.extract\(|Untar|Unzip|unpack_archive|processor=", source)


def declared_zip(size):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.bin", b"x" * 100)
    data = bytearray(stream.getvalue())
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", size)
    return bytes(data)


def declared_tar(size):
    info = tarfile.TarInfo("a.bin")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def declared_png(side):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rest = struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"")
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header)) + rest


def read_all(data, path):
    path.write_bytes(data)
    return list(read_members(path, lambda member: True))


@pytest.mark.parametrize(
    "read_bomb, message",
    [
        (lambda path: read_all(declared_zip(0xFFFFFFFE), path), "declares 4294967294"),
        (lambda path: read_all(declared_tar(10 << 30), path), "declares 10737418240"),
        (lambda path: read_all(gzip_bomb(), path), "more than 1048576 bytes once"),
        (lambda path: parse_idx(b"\0\0\x08\x03" + b"\0\1\0\0" * 3), "declares shape"),
        (lambda path: decode_image(declared_png(60_000), "x.png"), "pixels"),
        (lambda path: parse_libsvm(b"1\n" * 1000, 1 << 28), "would take 1073741824000 bytes"),
        (lambda path: parse_libsvm(b"1 1000000000000:1\n", 123), "not LIBSVM text"),
    ],
    ids=["zip", "tar", "gz", "idx", "png", "rows", "columns"],
)
def test_64_what_a_file_declares_is_checked_before_memory_is_taken(
    read_bomb, message, tmp_path, monkeypatch
):
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    if message.startswith("more"):
        monkeypatch.setattr(archives, "LIMIT", 1 << 20)
    with pytest.raises(DatasetError, match=message):
        read_bomb(tmp_path / "bomb")


def gzip_bomb():
    return gzip.compress(bytes(2 << 20))


@pytest.fixture
def elsewhere(tmp_path):
    """A file outside of the directory of a run."""
    path = tmp_path / "elsewhere" / "seed0" / "events.mine"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    return path


def test_65_a_link_in_the_place_of_a_result_is_replaced_and_not_followed(tmp_path, elsewhere):
    out = tmp_path / "out"
    out.mkdir()
    names = ["result.json", "figure.png"]
    for name in (*names, *(f".{os.getpid()}.{name}" for name in names)):
        (out / name).symlink_to(elsewhere)
    draw = {"figure.png": lambda path: path.write_text("drawn")}
    write(StudyResult("toy", {}, {}, wall_seconds=0.1, files=draw), out)
    assert elsewhere.read_text() == "mine"
    assert (out / "figure.png").read_text() == "drawn" and not (out / "figure.png").is_symlink()


def test_65_a_link_in_the_directory_of_a_run_is_not_deleted_through(tmp_path, elsewhere):
    out = tmp_path / "out"
    out.mkdir()
    (out / "seed0.csv").symlink_to(elsewhere)
    (out / "tensorboard").symlink_to(tmp_path / "elsewhere")
    clear(out)
    assert elsewhere.read_text() == "mine" and not (out / "seed0.csv").is_symlink()
    with pytest.raises(NotADirectoryError, match="would lead elsewhere"):
        events(out, 0)


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", "3"],
        ["--seeds", "1e3"],
        ["--steps", "1" + "0" * 30],
        ["--outer-rate", "nan"],
        ["--outer-rate", "ten"],
        ["--outer", "lion"],
        ["--method", "one_step:lr=1"],
        ["--method", "nobody"],
        ["\x1b[31mred"],
        ["\udcff"],  # a byte that is no UTF-8, as Python hands it over
    ],
)
def test_66_settings_that_are_none_are_refused_by_name(options, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "evil.py").write_text(TASK)
    try:
        status = cli.main(["tune", "evil:task", *options])
    except SystemExit as end:
        status = end.code
    sys.modules.pop("evil", None)
    shown = capsys.readouterr().err
    names = options[0].lstrip("-"), options[0].lstrip("-").replace("-", "_"), "lr", "an option"
    assert status in (1, 2) and any(name in shown for name in names)
    assert "Traceback" not in shown and "\x1b" not in shown


@pytest.mark.parametrize("gradients", ["1" + "0" * 400, '"many"', "null"])
def test_66_a_number_in_a_result_that_is_none_is_refused_with_its_place(gradients, tmp_path):
    write(StudyResult("toy", {}, summarize({"a": {"val_loss": [1.0]}}), 0.1), tmp_path)
    path = tmp_path / "result.json"
    content = path.read_text().replace(
        '"gradient_evaluations": 0', f'"gradient_evaluations": {gradients}'
    )
    path.write_text(content)
    with pytest.raises(ValueError, match=r"methods\.a: "):
        read(tmp_path)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e308", "NaN", '"x"', "[" * 100_000, "[[1]]"])
def test_66_hyperparameters_in_a_file_that_are_none_are_refused(value, tmp_path):
    path = tmp_path / "hyperparams.json"
    path.write_text(f'{{"best_seed": 0, "seeds": {{"0": {{"values": {{"value": {value}}}}}}}}}')
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_hyperparams(path, np.float32(1.0))


def test_67_escapes_and_markup_in_names_are_shown_and_never_obeyed(hostile_run):
    out, stdout, stderr = hostile_run
    assert r"\x1b[31m" in stdout and "\x1b" not in stdout + stderr
    kinds = (".csv", ".html", ".json", ".jsonl", ".py")
    texts = [path for path in out.rglob("*") if path.suffix in kinds]
    assert len(texts) >= 6
    assert not [path.name for path in texts if b"\x1b" in path.read_bytes()]
    assert "<script" not in (out / "report.html").read_text("utf-8")


def test_67_escapes_in_metrics_reach_neither_logs_nor_tables(tmp_path, capsys):
    for logger in (CSVLogger(tmp_path / "a.csv"), JSONLinesLogger(tmp_path / "a.jsonl"),
                   ProgressLogger()):  # fmt: skip
        with logger:
            logger.log({ESCAPE: 1.0}, step=1)
    result = StudyResult("toy", {}, summarize({"a": {f"val_{ESCAPE}": [1.0]}}), 0.1)
    write(result, tmp_path)
    shown = table(read(tmp_path)) + capsys.readouterr().err
    assert "\x1b" not in shown + "".join(path.read_text() for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="printable"):
        StudyResult(ESCAPE, {}, {}, 0.1)


def test_68_the_environment_is_in_no_file_and_on_no_screen(hostile_run):
    out, stdout, stderr = hostile_run
    shown = (stdout + stderr).encode() + b"".join(
        path.read_bytes() for path in out.rglob("*") if path.is_file()
    )
    assert b"token-of-nobody" not in shown and b"SECRET_TOKEN" not in shown


def test_68_only_variables_of_a_short_list_are_read():
    names, whole = set(), []
    for path in SOURCE.rglob("*.py"):
        text = path.read_text("utf-8")
        names |= set(re.findall(r"environ(?:\.get\(|\[)[\"'](\w+)", text))
        whole += re.findall(r"(?:dict|str|repr|print)\(os\.environ|environ\.items|getenv\(\)", text)
    assert names <= {"GRADHPO_DATA", "GRADHPO_TRACEBACK", "XLA_FLAGS"} and not whole


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_69_actions_are_pinned_by_commit_and_may_read_alone(path):
    text = path.read_text("utf-8")
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", each) for each in used)
    assert "permissions:\n  contents: read" in text


def test_69_dependencies_are_audited_every_week():
    weekly = (ROOT / ".github" / "workflows" / "weekly.yml").read_text("utf-8")
    assert "make audit" in weekly
    assert re.search(r"^audit:.*\n.*\n.*/pip-audit ", (ROOT / "Makefile").read_text("utf-8"), re.M)
    watched = (ROOT / ".github" / "dependabot.yml").read_text("utf-8")
    assert "github-actions" in watched and "pip" in watched


NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        raise AssertionError((event, arguments))

sys.addaudithook(refuse)
import jax.numpy as jnp, numpy as np, optax
import gradhpo as gh
from gradhpo import cli, datasets

train = lambda w, lam, batch: jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
judge = lambda w, lam, batch: jnp.mean((w - batch) ** 2)
data = datasets.gaussian_clusters(num_train=8, num_features=3).train.inputs
source = gh.Resident(data, 4)
problem = gh.BilevelProblem(gh.from_optax(train, optax.sgd(0.1)), judge)
task = gh.Task(problem, np.zeros(3, np.float32), jnp.float32(0.1), source, source)
gh.tune(task, gh.one_step(), episodes=2, T=2, lr_hyper=0.1)
assert cli.main(["list"]) == 0
"""


@pytest.mark.slow
@pytest.mark.faults
def test_70_importing_and_training_open_no_socket():
    done = subprocess.run([sys.executable, "-c", NO_NETWORK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_70_no_module_that_is_imported_can_reach_a_network():
    """Pooch alone does, and it is imported where a download has been asked for."""
    found = [
        f"{path.name}: {module}"
        for path in SOURCE.rglob("*.py")
        for module in re.findall(
            r"^\s*(?:import|from) (socket|urllib|http|requests|ftplib)\b",
            path.read_text("utf-8"),
            re.MULTILINE,
        )
    ]
    assert found == ["_interrupts.py: socket"]  # a pair of sockets within the process
