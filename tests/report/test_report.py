"""Intervals against SciPy, files that can be read again, tables and figures."""

import csv
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gradhpo import report
from gradhpo.report import (
    StudyResult,
    interval,
    paired,
    plots,
    read,
    summarize,
    table,
    write,
)

RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path = Path("results/toy")
    method: tuple[str, ...] = ("fixed", "t1t2")
    rate: float = float("inf")
    data_dir: Path | None = None
    steps: np.int64 = np.int64(3)


def toy(seeds=4, epochs=3, **changes):
    luck = RNG.normal(size=(seeds, 1))  # what a seed decides, for both methods
    curve = luck + RNG.normal(size=(seeds, epochs)) / 100
    values = {
        "fixed": {"val_loss": curve[:, -1], "val_loss_by_epoch": curve},
        "t1t2": {"val_loss": curve[:, -1] - 0.5, "val_loss_by_epoch": curve - 0.5},
    }
    costs = {"fixed": (100, 0), "t1t2": (1200, 100)}
    fields = {
        "study": "toy",
        "settings": Settings(),
        "methods": summarize(values, costs, baseline="fixed"),
        "wall_seconds": 1.5,
        "data": {"train.bin": "0" * 64},
    }
    return StudyResult(**(fields | changes))


@pytest.mark.parametrize("shape", [(2,), (7,), (5, 3)])
def test_interval_is_student_t(shape):
    values = RNG.normal(size=shape) * 3 + 1
    got = interval(values)
    sem = stats.sem(values, axis=0)
    want = stats.t.interval(0.95, shape[0] - 1, loc=values.mean(axis=0), scale=sem)
    np.testing.assert_allclose(got.ci95, want, rtol=1e-12)
    np.testing.assert_allclose(got.mean, values.mean(axis=0), rtol=1e-12)


def test_interval_covers_the_mean_in_95_percent_of_studies():
    values = np.random.default_rng(1).normal(size=(5, 4000))  # 4000 studies of five seeds
    low, high = interval(values).ci95
    covered = np.mean((low < 0) & (high > 0))
    assert abs(covered - 0.95) < 0.0138  # four standard errors, 4 sqrt(.95 .05 / 4000)


def test_one_seed_has_no_interval():
    assert interval([2.0]).to_json() == {"mean": 2.0, "ci95": [None, None], "seeds": [2.0]}
    assert interval([[1.0, 2.0]]).to_json()["ci95"] == [[None, None], [None, None]]


def test_a_diverged_seed_is_not_dropped():
    summary = interval([1.0, np.nan, 3.0])
    assert np.isnan(summary.mean) and np.isnan(summary.ci95).all()
    assert interval([1.0, np.inf]).to_json() == {
        "mean": None,
        "ci95": [None, None],
        "seeds": [1.0, None],
    }


@pytest.mark.parametrize("values", [[], 3.0, np.zeros((2, 0)), np.zeros((2, 2, 2))], ids=str)
def test_interval_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="shape"):
        interval(values)


def test_paired_removes_what_the_seed_decides():
    luck, gain = RNG.normal(size=10) * 100, 0.1 + RNG.normal(size=10) / 100
    got = paired(luck + gain, luck)
    want = stats.ttest_rel(luck + gain, luck).confidence_interval(0.95)
    np.testing.assert_allclose(got.ci95, [want.low, want.high], rtol=1e-9)
    assert got.ci95[0] > 0 > interval(luck + gain).ci95[0] - luck.mean()
    with pytest.raises(ValueError, match="same seeds"):
        paired([1.0, 2.0], [1.0])


def test_written_results_have_the_fixed_form(tmp_path):
    result = toy()
    paths = write(result, tmp_path / "a b" / "ü")
    assert [path.name for path in paths] == ["result.json", "curves.csv"]
    assert sorted(os.listdir(paths[0].parent)) == ["curves.csv", "result.json"]  # nothing left over
    data = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert list(data) == [
        "study", "settings", "versions", "command", "wall_seconds", "data", "methods",
    ]  # fmt: skip
    assert data["settings"] == {
        "out": str(Path("results/toy")),
        "method": ["fixed", "t1t2"],
        "rate": None,
        "data_dir": None,
        "steps": 3,
    }
    t1t2 = data["methods"]["t1t2"]
    assert list(t1t2) == [
        "metrics", "gradient_evaluations", "second_order_products", "paired_difference",
    ]  # fmt: skip
    assert list(t1t2["metrics"]["val_loss"]) == ["mean", "ci95", "seeds"]
    assert np.shape(t1t2["metrics"]["val_loss_by_epoch"]["ci95"]) == (2, 3)
    assert np.shape(t1t2["metrics"]["val_loss_by_epoch"]["seeds"]) == (4, 3)
    difference = t1t2["paired_difference"]["val_loss"]
    assert list(difference) == ["to", "mean", "ci95", "seeds"]
    assert difference["to"] == "fixed" and math.isclose(difference["mean"], -0.5)
    assert data["methods"]["fixed"]["paired_difference"] == {}


def test_reading_gives_back_what_was_written(tmp_path):
    values = {"fixed": {"test_mse": [1.0, np.nan]}, "t1t2": {"test_mse": [0.1, 1 / 3]}}
    for result in (toy(), toy(seeds=1), toy(methods=summarize(values, baseline="fixed"))):
        write(result, tmp_path)
        again = read(tmp_path)
        assert again.to_json() == result.to_json()
        assert table(again) == table(result)


def test_curves_are_one_row_per_value(tmp_path):
    values = {"a,b": {"val_loss": [1.0, np.nan], "val_loss_by_epoch": [[2.0, 1.0], [3.0, np.inf]]}}
    write(toy(methods=summarize(values)), tmp_path)
    rows = list(csv.reader((tmp_path / "curves.csv").read_text().splitlines()))
    assert rows == [
        ["method", "metric", "seed", "epoch", "value"],
        ["a,b", "val_loss", "0", "", "1.0"],
        ["a,b", "val_loss", "1", "", "nan"],
        ["a,b", "val_loss_by_epoch", "0", "1", "2.0"],
        ["a,b", "val_loss_by_epoch", "0", "2", "1.0"],
        ["a,b", "val_loss_by_epoch", "1", "1", "3.0"],
        ["a,b", "val_loss_by_epoch", "1", "2", "inf"],
    ]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write(toy(), tmp_path)
    before = (tmp_path / "result.json").read_text()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write(toy(wall_seconds=2.5), tmp_path)
    assert (tmp_path / "result.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["curves.csv", "result.json"]


def test_further_files_are_all_tried_and_the_first_failure_named(tmp_path):
    def full(path):
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    def absent(path):
        return Path("train.bin").read_bytes()

    draw = lambda path: path.write_text(path.suffix)  # noqa: E731
    with pytest.raises(OSError, match=r"No space left on device: .*full\.csv"):
        write(toy(files={"full.csv": full, "a.png": draw, "b.png": absent}), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "curves.csv", "result.json"]
    assert (tmp_path / "a.png").read_text() == ".png"  # its format, under any name
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):  # not the figure it is for
        write(toy(files={"b.png": absent}), tmp_path)


def change(*path, to):
    """An edit of a parsed result.json; `...` removes the key."""

    def apply(data):
        for key in path[:-1]:
            data = data[key]
        if to is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = to

    return apply


LOSS = ("methods", "t1t2", "metrics", "val_loss")
DAMAGE = [
    (change("wall_seconds", to=...), "wall_seconds"),
    (change("extra", to=1), "extra"),
    (change("study", to=7), "study"),
    (change("study", to="\x1b[31m"), "printable"),
    (change("methods", to=[]), "methods"),
    (change("methods", "t1t2", to=3), "methods.t1t2"),
    (change("methods", "t1t2", "gradient_evaluations", to="9"), "methods.t1t2: costs"),
    (change("methods", "fixed", to=...), "'fixed', which is absent"),
    (change("methods", "t1t2", "metrics", "score", to={}), "methods.t1t2: metrics.score"),
    (change(*LOSS, "mean", to="0.5"), "methods.t1t2: metrics.val_loss: "),
    (change(*LOSS, "seeds", to=[]), "metrics.val_loss: seeds"),
    (change(*LOSS, "seeds", to=[[1.0], [1.0, 2.0]]), "metrics.val_loss: "),
    (change(*LOSS, "seeds", 0, to=10**400), "metrics.val_loss: "),
    (change(*LOSS, "ci95", to=[1.0]), "metrics.val_loss: "),
    (change(*LOSS, "mean", to=float("nan")), "NaN is not JSON"),
]


@pytest.mark.parametrize("edit, message", DAMAGE, ids=[message for _, message in DAMAGE])
def test_a_damaged_file_is_refused_with_the_place(edit, message, tmp_path):
    write(toy(), tmp_path)
    data = json.loads((tmp_path / "result.json").read_text())
    edit(data)
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="not a result of gradhpo") as raised:
        read(tmp_path)
    assert message in str(raised.value) and "result.json" in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "3", "\x00"], ids=range(6))
def test_what_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="not a result of gradhpo"):
        read(tmp_path)


def test_no_result_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result.json in"):
        read(tmp_path)


def test_names_and_shapes_are_checked_where_they_enter():
    with pytest.raises(ValueError, match="unknown metric 'score'; known: train_loss"):
        summarize({"fixed": {"score": [1.0]}})
    for bad in ({"val_loss": [[1.0, 2.0]]}, {"val_loss_by_epoch": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="_by_epoch"):
            summarize({"fixed": bad})
    with pytest.raises(ValueError, match="'zero' is none of the methods: fixed"):
        summarize({"fixed": {"val_loss": [1.0]}}, baseline="zero")
    with pytest.raises(ValueError, match="'zero' is none of the methods"):
        summarize({"fixed": {"val_loss": [1.0]}}, costs={"zero": (1, 1)})
    with pytest.raises(ValueError, match="printable"):
        toy(study="a\nb")
    with pytest.raises(TypeError, match="settings cannot hold a function"):
        toy(settings={"f": table}).to_json()


def test_the_table_says_what_was_measured():
    values = {
        "fixed": {"test_accuracy": [0.80, 0.82, 0.84], "val_loss_by_epoch": np.full((3, 2), 2.0)},
        "better": {"test_accuracy": [0.90, 0.925, 0.94], "val_loss_by_epoch": np.full((3, 2), 1.0)},
        "unclear": {"test_accuracy": [0.79, 0.83, 0.84], "val_loss_by_epoch": np.full((3, 2), 1e9)},
        "diverged": {"test_accuracy": [0.79, np.nan, 0.84]},
    }
    costs = {"better": (1234567, 8)}
    got = table(toy(methods=summarize(values, costs, baseline="fixed")))
    assert got == TABLE.strip("\n")
    assert got.isascii()


TABLE = """
toy: mean and 95 % interval over 3 seeds; * where the interval of the paired difference excludes 0

test_accuracy (higher is better)
method     mean   95 % interval  difference     95 % interval     to     gradients  2nd-order products
fixed     0.820  [0.770, 0.870]                                                  0                   0
better    0.922  [0.871, 0.972]      +0.102  [+0.094, +0.109]  *  fixed  1,234,567                   8
unclear   0.820  [0.754, 0.886]      +0.000  [-0.025, +0.025]     fixed          0                   0
diverged    nan                         nan                       fixed          0                   0

val_loss, last epoch (lower is better)
method        mean           95 % interval  gradients  2nd-order products
fixed       2.0000        [2.0000, 2.0000]          0                   0
better      1.0000        [1.0000, 1.0000]  1,234,567                   8
unclear  1.000e+09  [1.000e+09, 1.000e+09]          0                   0
"""  # noqa: E501


def test_one_seed_is_a_table_too():
    got = table(toy(seeds=1))
    assert "over 1 seed;" in got and "[" not in got and "*" not in got.split("\n", 1)[1]
    assert table(toy(methods={})) == "toy: mean and 95 % interval over no seeds"


def test_versions_and_command_tell_nothing_about_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    monkeypatch.setattr(sys, "argv", ["/home/ann/bin/gradhpo", "run", "toy", "--out", "a b"])
    write(toy(), tmp_path)
    text = (tmp_path / "result.json").read_text()
    assert "a-secret-token" not in text and "/home/ann" not in text
    result = read(tmp_path)
    assert result.command == "gradhpo run toy --out 'a b'"
    assert set(result.versions) == {
        "python", "jax", "jaxlib", "optax", "numpy", "gradhpo", "backend", "x64",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/home/ann/code/demo.py", "--seed", "3"])
    assert report.command() == "python demo.py --seed 3"


def test_everything_listed_exists():
    assert all(hasattr(report, name) for name in report.__all__)
    assert all(hasattr(plots, name) for name in plots.__all__)
