"""A thousand command lines and damaged files: one line of error each, never a traceback, and
nothing written outside of the directory that was given.

Everything goes through `gradhpo.cli.main`, in this process. Example number i is a function of i
alone: `attempt(i)` of a group makes it again.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from dataclasses import field, make_dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gradhpo import cli, datasets
from gradhpo.report import StudyResult, summarize, write
from gradhpo.report.config import DataStudyConfig
from gradhpo.studies import registry
from gradhpo.studies.registry import Study

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
image_module = pytest.importorskip("PIL.Image")

TASK = """
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam["decay"] * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


PROBLEM = gh.BilevelProblem(gh.from_optax(loss, optax.sgd(0.1)), judge)


def task(seed=0, examples=20):
    data = np.random.default_rng(seed).normal(2.0, 1.0, (examples + 20, 3)).astype(np.float32)
    return gh.Task(
        PROBLEM,
        np.zeros(3, np.float32),
        {"decay": np.float32(1.0)},
        train=gh.Resident(data[:examples], 5, seed=seed),
        val=gh.Resident(data[examples:], 8, seed=seed + 1),
    )


fixed = task()
nothing = 1
"""

RUDE = [
    *("", " ", "-", "--", "---x", "=", "--=1", "..", "../x", "/", "~", ".", "a/b", "a\\b", "C:\\x"),
    *("CON", "nul.txt", "x\0y", "\x1b[31mred", "<script>", "\u202eevil", "\udcff", "ü ñ 漢", "\n"),
    *("nan", "inf", "-inf", "-1", "0", "1e400", "1" + "0" * 30, "1.5", "0x10", "1_0", "None"),
    *("True", "[", "{", "{}", "[]", "()", "'", '"', "%s", "{0}", "x" * 5000, "[" * 3000, "--help"),
    *("task:task", "small:", ":task", "small:task:x", "..:x", ".small:task", "small..x:task"),
    *("x=1", "=1", "x=", "x==", "decay=[" + "1," * 50 + "]", "decay=1e999", "examples=-5"),
]
WORDS = [
    "small:task",
    "small:fixed",
    "small:nothing",
    "small:absent",
    "absent:task",
    "toy",
    "digits",
]
SMALL = ["1", "2", "0", "-1", "x", "1.5", "nan", ""]
METHODS = ["one_step", "first_order", "random", "one_step:outer_rate=0.1", "one_step:x=1",
           "random:x=1", "one_step:=", "one_step:outer_rate=nan", "greedy", "nobody"]  # fmt: skip
OPTIONS = {
    "--seeds": SMALL,
    "--episodes": SMALL,
    "--steps": [*SMALL, "2000000000", "1" + "0" * 12, "1" + "0" * 30],
    "--trials": SMALL,
    "--patience": SMALL,
    "--warm-start": SMALL,
    "--budget": ["0", "50", "-1", "nan", "x"],
    "--outer-rate": ["0.1", "0", "-1", "nan", "inf", "1e300", "x"],
    "--width": ["1", "0", "inf", "1e300", "x"],
    "--outer": ["adam", "sgd", "x"],
    "--method": METHODS,
    "--set": ["decay=0.5", "decay=x", "decay=1e999", "examples=30", "examples=0", "examples=x"],
    "--limit": ["1", "0", "nan", "x"],
    "--out": [
        "out",
        "a b/ü",
        "small.py",
        "small.py/x",
        "../out",
        "x\0y",
        "n" * 300,
        "",
        "/dev/null",
    ],
    "--dataset": ["digits", "mnist", "gaussian-clusters", "x", ""],
    "--data-dir": ["data", "absent", "small.py", "x\0y", ""],
    "--rate": ["0.1", "x", "nan"],
    "--overwrite": [None],
    "--alone": [None],
    "--tensorboard": [None],
    "--fast": [None],
    "--equinox": [None],
    "--plain": [None],
    "--flax": ["nnx", "linen", "x"],
}
OF = {
    "demo": ["--out", "--seeds", "--overwrite", "--method", "--fast"],
    "run": ["--out", "--seeds", "--overwrite", "--method", "--fast", "--dataset", "--data-dir",
            "--rate"],
    "tune": ["--out", "--seeds", "--episodes", "--steps", "--trials", "--patience", "--warm-start",
             "--outer-rate", "--width", "--outer", "--method", "--set", "--overwrite", "--alone",
             "--tensorboard"],
    "compare": ["--out", "--seeds", "--episodes", "--steps", "--budget", "--outer-rate", "--width",
                "--outer", "--method", "--set", "--overwrite"],
    "doctor": ["--set", "--steps", "--episodes", "--method", "--limit"],
    "init": ["--equinox", "--plain", "--flax"],
    "report": [],
    "list": [],
}  # fmt: skip
SHORT = {
    "tune": ["--episodes", "2", "--steps", "2", "--trials", "2"],
    "compare": ["--episodes", "2", "--steps", "2", "--budget", "12"],
    "doctor": ["--episodes", "2", "--steps", "2", "--limit", "1"],
}
COUNTS = {"command lines": 400, "data files": 350, "results": 250}


@pytest.fixture
def sandbox(tmp_path, monkeypatch, watched):
    """An empty directory inside another, with a task, and a study that only loads its data."""
    monkeypatch.delenv("GRADHPO_DATA", raising=False)
    monkeypatch.delenv("GRADHPO_TRACEBACK", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in" / "cache"))
    study = ModuleType("toy_study")
    vars(study).update(Config=_config(), DemoConfig=_config("out/demo"), run=run, demo=demo)
    study.separated = lambda config: config
    monkeypatch.setitem(sys.modules, "toy_study", study)
    studies = {name: Study("toy_study", "a study of nothing") for name in ("toy", "tutorial")}
    monkeypatch.setattr(registry, "STUDIES", studies)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("socket.socket.connect", _refuse)
    monkeypatch.setattr("socket.getaddrinfo", _refuse)
    place = tmp_path / "in"

    def fresh() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "small.py").write_text(TASK)
        os.chdir(place)
        watched.clear()
        return place

    monkeypatch.chdir(tmp_path)
    yield fresh
    os.chdir(tmp_path)
    sys.modules.pop("small", None)


def _refuse(*_, **__):
    raise OSError("no network in this test")


def _config(out="results"):
    fields = [
        ("out", Path, field(default=Path(out))),
        ("dataset", str, field(default="digits")),
        ("rate", float, field(default=0.1)),
    ]
    return make_dataclass("Config", fields, bases=(DataStudyConfig,), frozen=True)


def run(config, progress=None):
    data = datasets.load(config.dataset, *[config.data_dir] * (config.dataset != "digits"))
    values = {"fixed": {"val_loss": [float(data.train.inputs.mean())]}}
    return StudyResult("toy", config, summarize(values), wall_seconds=0.1, data=data.files)


def demo(config, command):
    write(StudyResult("tutorial", config, {}, wall_seconds=0.1, command=command), config.out)


ended = Counter()  # how often a status ended a command of this group
WRITES = ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.truncate")
seen: list[str] = []
watching = []


def _audit(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
        if isinstance(path, str | bytes | os.PathLike) and writes:
            seen.append(os.path.abspath(os.fsdecode(path)))
    elif event in WRITES:
        seen.extend(os.path.abspath(os.fsdecode(x)) for x in arguments[:2] if isinstance(x, str))


@cache
def _hook():
    sys.addaudithook(_audit)  # which stays; it does nothing while nobody watches


@pytest.fixture
def watched():
    """Paths that are written to, made or removed."""
    _hook()
    watching.append(True)
    seen.clear()
    yield seen
    watching.clear()


def outcome(arguments, place, capsys):
    """What is wrong with the end of a command; None where nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        capsys.readouterr()
        return f"{type(error).__name__}: {str(error)[:300]}"
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("gradhpo: ")]
    if status not in (0, 1, 2) or "Traceback" in shown.err or "\x1b" in shown.out + shown.err:
        return f"status {status}: {shown.err[-500:]}"
    if status == 1 and len(errors) != 1 and arguments[0] != "doctor":
        return f"{len(errors)} lines of error: {shown.err[-500:]}"
    if status == 2 and not shown.err:
        return "status 2 without a word"
    ended[status] += 1
    given = [os.path.abspath(x) for x in arguments if arguments[0] != "list" and "\0" not in x]
    outside = [path for path in seen if not _allowed(path, (str(place), *given))]
    return f"wrote {outside}" if outside else None


def _allowed(path, given):
    caches = os.environ.get("JAX_COMPILATION_CACHE_DIR", "/dev/"), "/dev/"
    return path.startswith((*caches, *given)) or "__pycache__" in path or "matplotlib" in path


def failures(group, attempt, sandbox, capsys):
    """`{number: what is wrong}` of the examples of a group."""
    found = {}
    ended.clear()
    for i in range(COUNTS[group]):
        place = sandbox()
        arguments = attempt(random.Random(f"{group} {i}"), place)
        if problem := outcome(arguments, place, capsys):
            found[i] = f"{[each[:60] for each in arguments]}: {problem}"
    return found


def command_line(draw, place):
    command = draw.choice(list(OF))
    rest = []
    if command in SHORT:
        rest += [_mostly(draw, "small:task"), *SHORT[command]]
    elif command == "run":
        rest += [_mostly(draw, "toy")]
    elif command == "report" or draw.random() < 0.2:
        rest += [draw.choice([*RUDE, "small.py", "absent"])]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        option = draw.choice(OF[command] or list(OPTIONS))
        value = draw.choice(OPTIONS[option] if draw.random() < 0.85 else RUDE)
        if option in ("--seeds", "--episodes", "--trials", "--warm-start", "--budget"):
            value = draw.choice(OPTIONS[option])  # large ones are meant: they take long
        if option in ("--set", "--method") and draw.random() < 0.2:
            rest += [option]
        rest += [option] if value is None else [option, value]
    if draw.random() < 0.1:
        rest.insert(draw.randrange(len(rest) + 1), draw.choice(RUDE))
    return [command if draw.random() < 0.97 else draw.choice(RUDE), *rest]


def _mostly(draw, word):
    return word if draw.random() < 0.8 else draw.choice(draw.choice([WORDS, RUDE]))


def mutated(draw, data):
    """Bytes with flipped bits, cut short, repeated, or with a stretch of others."""
    data = bytearray(data)
    kind = draw.choice(["flip", "flip", "cut", "noise", "insert", "double", "empty", "ones"])
    if not data or kind == "empty":
        return b""
    at = draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "noise":
        data[at : at + 16] = draw.randbytes(16)
    elif kind == "insert":
        data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
    elif kind == "double":
        data += bytes(data)
    else:
        data[at : at + 4] = b"\xff" * 4
    return bytes(data)


def _idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def _picture(kind, mode="L"):
    stream = io.BytesIO()
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image_module.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def _tar(files, mode):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _zip(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


IDX = {
    f"train-{kind}-ubyte": _idx(array)
    for kind, array in (
        ("images-idx3", np.arange(48).reshape(3, 4, 4)),
        ("labels-idx1", np.arange(3)),
    )
}
TEXT = b"-1 1:0.5 22:-2\n1 3:1e-3 \n+1 2:4\n"
FOLDERS = {f"train/{c}/0.png": _picture("PNG") for c in "ab"}
RECORDS = {"data_batch_1.bin": bytes(range(256)) * 12 + b"\0"}
SETS = {
    "mnist": IDX,
    "fashion_mnist": FOLDERS,
    "cifar10": RECORDS,
    "cifar100": {"train/a/0.jpg": _picture("JPEG", "RGB"), "train/b/0.png": _picture("PNG", "P")},
    "a9a": {"a9a": TEXT, "a9a.t": TEXT},
    "ijcnn1": {"ijcnn1.tr": TEXT, "ijcnn1.val": TEXT, "SHA256SUMS": b"0" * 64 + b"  other\n"},
    "omniglot": {
        f"images_background/A/character0{c}/000{c}_01.png": _picture("PNG", "1") for c in (1, 2)
    },
}
CONTAINERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    "zip": _zip,
    "tar": partial(_tar, mode="w:"),
    "tar.gz": partial(_tar, mode="w:gz"),
    "tar.xz": partial(_tar, mode="w:xz"),
}


def data_file(draw, place):
    name = draw.choice(list(SETS))
    kind = draw.choice(list(CONTAINERS))
    files = dict(SETS[name])
    if draw.random() < 0.4:  # inside, so that what contains it is whole
        inner = draw.choice(list(files))
        files[inner] = mutated(draw, files[inner])
    if draw.random() < 0.15:
        files[draw.choice(["../out", "/out", "a\\..\\b", "x\0y", "n" * 300, "C:/x"])] = b"x"
    if kind.startswith(("zip", "tar")):
        files = {"any name": CONTAINERS[kind](files)}
    else:
        files = {path + kind: CONTAINERS[kind](data) for path, data in files.items()}
    if draw.random() < 0.7:
        outer = draw.choice(list(files))
        files[outer] = mutated(draw, files[outer])
    for path, data in files.items():
        target = place / "data" / name / path
        if "\0" in path or not target.resolve().is_relative_to(place / "data") or len(path) > 250:
            continue  # no file system has such a name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return ["run", "toy", "--dataset", name, "--data-dir", "data"]


def _value(draw, depth=0):
    """Any JSON, and some that is none."""
    plain = [None, True, False, 0, -1, 1.5, 10**400, 1e308, "", "x", "\x1b[31m", "\ud800", "\0"]
    if depth > 3 or draw.random() < 0.6:
        return draw.choice(plain)
    inner = [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return inner if draw.random() < 0.5 else {draw.choice(["a", "mean", "", "\x1b"]): inner}


def result_file(draw, place):
    losses = {
        "fixed": {"val_loss": [1.0, 2.0], "val_loss_by_epoch": np.ones((2, 3))},
        "t1t2": {"val_loss": [1.5, np.nan]},
    }
    write(StudyResult("toy", {"a": 1}, summarize(losses, baseline="fixed"), 0.1), place / "out")
    path = place / "out" / "result.json"
    content = json.loads(path.read_text())
    kind = draw.choice(["bytes", "bytes", "leaf", "leaf", "leaf", "any", "deep", "drop"])
    if kind == "bytes":
        path.write_bytes(mutated(draw, path.read_bytes()))
    elif kind == "any":
        path.write_text(json.dumps(_value(draw)), errors="replace")
    elif kind == "deep":
        path.write_text(draw.choice(["[", '{"a":']) * draw.choice([100, 100_000]))
    else:
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = draw.choice(keys)
            inner = at[key]
            if not (isinstance(inner, dict | list) and inner) or draw.random() < 0.2:
                break
            at = inner
        if kind == "drop":
            del at[key]
        else:
            at[key] = _value(draw)
        if isinstance(at, dict) and draw.random() < 0.2:
            at[draw.choice(["\x1b[31m", "x" * 9999, "../x", ""])] = inner
        path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    return ["report", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "group, attempt",
    [("command lines", command_line), ("data files", data_file), ("results", result_file)],
    ids=list(COUNTS),
)
def test_a_thousand_commands_and_files_without_a_traceback(group, attempt, sandbox, capsys):
    found = failures(group, attempt, sandbox, capsys)
    print(group, dict(ended))
    assert not found, "\n".join(f"{i}: {what}" for i, what in found.items())
    assert min(ended[0], ended[1]) > COUNTS[group] // 20, ended  # both ends of a command are met
