"""Studies that are cut off and go on: the numbers of one that was not, and no work done twice."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from gradhpo import datasets, report  # noqa: E402
from gradhpo.core.types import DataBatch  # noqa: E402
from gradhpo.report import parts  # noqa: E402
from gradhpo.studies.registry import STUDIES, load  # noqa: E402

SIZES = {"train_size": 60, "val_size": 60, "seeds": 2}
IMAGES = {**SIZES, "episodes": 2, "steps": 5}
PIXELS = {"dataset": "digits", "channels": 2, "seeds": 2, "points": 2}
SETTINGS = {  # the smallest runs there are
    "tutorial": {"seeds": 2, "episodes": 3, "steps": 5, "method": ("one_step", "greedy")},
    "hyper_cleaning": {
        **{**SIZES, "dataset": ("digits",), "label_noise": (0.3,), "momentum": ("fresh",)},
        **{"updates": 4, "steps": 5, "method": ("one_step",)},
    },
    "hyper_cleaning_projected": {
        **{**SIZES, "dataset": "digits", "budget": (0.4, 0.5), "steps": 5, "updates": 4},
    },
    "mixed": {**SIZES, "steps": 5, "relaxed": 3, "held": 2, "enumerated": 3, "trials": 4},
    "crossover": {"seeds": 2, "sizes": (1,), "trials": 6, "steps": 3, "method": ("tpe", "reverse")},
    "feature_selection": {
        **{"dataset": ("a9a",), "train_size": 150, "val_size": 300, "test_size": 400, "noise": 5},
        **{"seeds": 2, "updates": 5, "method": ("ridge", "implicit")},
    },
    "sparse": {**SIZES, "steps": 5, "dense_updates": 2, "method": ("dense", "tpe")},
    "meta_weight_net": {
        **{"dataset": "digits", "train_size": 90, "val_size": (30,), "steps": 30, "seeds": 2},
        **{"batch_size": 10, "method": ("one_step",)},
    },
    "regularisation": {**IMAGES, "method": ("one_step",)},
    "learning_rate": {**IMAGES, "method": ("one_step",)},
    "augmentation": {**IMAGES, "method": ("one_step",)},
    "image_training": {
        **{"seeds": 2, "steps": 4, "batch_size": 5, "train_size": 12, "val_size": 8},
        **{"trainings": 2, "method": ("reverse", "fixed")},
    },
    "single_loop": {"seeds": 2, "batch_size": 10, "budget": 700, "method": ("soba", "stocbio")},
    "hypergradient_descent": {"dataset": "digits", "train_size": 256, "seeds": 2, "epochs": 2},
    "schedule": {"iterations": 3, "steps": 6, "examples": 50, "momentum": 0.9, "seeds": 2},
    "distill_data": {"iterations": 3, "examples": 300, "seeds": 2},
    "regularisation_map": {"iterations": 3, "examples": 300, "seeds": 2},
    "chaos": {"points": 4, "examples": 60, "seeds": 2},
    "sinusoid": {
        **{"setting": "short", "seeds": 2, "episodes": 2, "tests": 5},
        **{"method": ("one_step", "hyperdistill")},
    },
    "maml": {
        **{"seeds": 3, "shots": (5,), "tasks": 2, "meta_steps": 2, "tests": 4},
        **{"method": ("maml", "reptile")},
    },
    "omniglot": {
        **{"seeds": 1, "ways": (3,), "updates": 4, "points": 2, "tests": 8},
        **{"method": ("greedy", "fo")},
    },
    "cosine": {"family": "sinusoid", "seeds": 2, "tasks": 4, "checkpoints": 2, "every": 1},
    "toy": {"seeds": 2, "steps": 5, "outer_rate": 0.1, "method": ("T1-T2, T=5", "full, T=5")},
    "many_shot": {
        **{**PIXELS, "ways": 2, "steps": 4, "batch_size": 10, "episodes": 2, "meta_batch": 2},
        **{"tests": 2, "method": ("fo", "one_step")},
    },
    "two_stage": {**PIXELS, "steps": 10, "batch_size": 20, "method": ("fixed", "one_step")},
    "cost": {"models": ("anil",), "fast": True, "method": ("fo", "one_step")},
    "check": {"seeds": 2, "steps": 4, "fast": True, "method": ("one_step", "reverse")},
}
TIMED = {  # metrics and files that hold times
    "image_training": ({"seconds"}, ()),
    "crossover": (set(), ("crossover.csv", "crossover.png")),
    "single_loop": (set(), ("points.csv", "hypergradient.png", "validation.png")),
    "cost": ({"seconds"}, ("table.csv", "cost.png", "curves.csv")),
}


@functools.cache
def noise(study):
    """Data that are shaped like those of a study whose own have to be downloaded."""
    rng = np.random.default_rng(0)
    if study in ("feature_selection", "single_loop"):
        x = rng.normal(size=(900, 4)).astype(np.float32)
        y = (x[:, 0] - 2 * x[:, 1] + 0.3 * rng.normal(size=900) > 0).astype(np.int32)
        return datasets.Dataset("table", DataBatch(x, y), None, 2)
    if study == "omniglot":
        patterns = rng.random((15, 1, 16, 16)) > 0.5
        pixels = np.clip(patterns + rng.normal(0, 0.3, (15, 12, 16, 16)), 0, 1).astype(np.float32)
        train, test = (DataBatch(x, np.zeros(len(x))) for x in (pixels[:10], pixels[10:]))
        return datasets.Dataset("omniglot", train, test, 1)
    labels = rng.integers(0, 10, 2000).astype(np.int32)
    if study == "image_training":
        pixels = rng.integers(0, 256, (2000, 32, 32, 3)).astype(np.uint8)
        train, test = (DataBatch(pixels[s], labels[s]) for s in (slice(40), slice(40, 60)))
        return datasets.Dataset("cifar10", train, test, 10)
    pixels = rng.uniform(0, 1, (10, 28, 28, 1))[labels] + 0.1 * rng.normal(size=(2000, 28, 28, 1))
    return datasets.Dataset("noise", DataBatch(pixels.astype(np.float32), labels), None, 10)


class CutOff(BaseException):
    """In the place of a signal."""


def run(name, out, monkeypatch, at_most=None, resume=False):
    """A run as that of `gradhpo run`: how many parts it computed. Cut off after `at_most`."""
    study, computed = load(name), []
    config = study.Config(**SETTINGS[name], out=out, resume=resume)
    whole = parts.Parts.once

    def once(self, part, compute, types):
        def counted():
            if len(computed) == at_most:
                raise CutOff
            computed.append(part)
            return compute()

        return whole(self, part, counted, types)

    own_data = config.__dict__.get("dataset") not in ("digits", ("digits",))
    if own_data and name not in ("mixed", "sparse", "regularisation", "learning_rate"):
        monkeypatch.setattr(datasets, "load", lambda *_: noise(name))
    monkeypatch.setattr(parts.Parts, "once", once)
    out.mkdir(exist_ok=True)
    with parts.keeping(name, config, lambda line: None) as kept:
        report.write(study.run(config), out)
        kept.finish()
    return len(computed)


def contents(out, name):
    """Of all files, but for times, versions and the place."""
    metrics, files = TIMED.get(name, (set(), ()))
    found = {p.name: p.read_bytes() for p in out.iterdir() if p.name not in files}
    result = json.loads(found["result.json"])
    for key in ("wall_seconds", "versions", "command"):
        del result[key]
    del result["settings"]["out"], result["settings"]["resume"]
    del found["run.json"]  # has a name of its own
    for method in result["methods"].values():
        for group in (method["metrics"], method["paired_difference"]):
            for metric in metrics & group.keys():
                del group[metric]
    if metrics and "curves.csv" in found:
        lines = found["curves.csv"].splitlines()
        found["curves.csv"] = [x for x in lines if x.split(b",")[1].decode() not in metrics]
    return found | {"result.json": result}


def goes_on(name, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_all = run(name, tmp_path / "whole", patch)
    assert in_all > 1
    done = in_all // 2
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        run(name, tmp_path / "cut", patch, at_most=done)
    there = parts.unfinished_parts(tmp_path / "cut")
    assert done <= len(there) <= done + 1  # two at a time in `tutorial` and `sinusoid`
    with monkeypatch.context() as patch:
        assert run(name, tmp_path / "cut", patch, resume=True) == in_all - len(there)
    got, want = (contents(tmp_path / which, name) for which in ("cut", "whole"))
    assert got.keys() == want.keys()
    assert [file for file in want if got[file] != want[file]] == []


@pytest.mark.parametrize("name", ["tutorial", "maml", "regularisation"])
def test_01_a_study_that_was_cut_off_goes_on(name, tmp_path, monkeypatch):
    goes_on(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_01_every_study_goes_on(name, tmp_path, monkeypatch):
    if name in ("mixed", "crossover", "sparse"):
        pytest.importorskip("optuna")
    if name == "meta_weight_net":
        pytest.importorskip("flax")
    goes_on(name, tmp_path, monkeypatch)


def test_22_a_part_comes_back_as_it_was(tmp_path):
    """Bits, types and order: what follows is computed from it."""
    from gradhpo.report.packing import pack, unpack

    tiny = np.nextafter(np.float32(0), np.float32(1))
    value = {
        "numbers": (1, True, None, -0.0, 0.1, float("nan"), float("-inf"), 2**80, "ä\n"),
        3: [np.float64(0.1), np.int32(-1), np.bool_(False), np.array(tiny), np.zeros((0, 3))],
        ("a", 1): np.arange(6, dtype=">i2").reshape(2, 3).T,
        "jax": jnp.arange(3.0),
    }
    got = unpack(json.loads(json.dumps(pack(value))))
    assert list(got) == list(value) and repr(got["numbers"]) == repr(value["numbers"])
    arrays = ([*each[3], each["a", 1], each["jax"]] for each in (got, value))
    for a, b in zip(*arrays, strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype and np.shape(a) == np.shape(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert isinstance(a, np.generic) == isinstance(b, np.generic)
    for wrong in (object(), {1, 2}, np.array(["a"]), DataBatch(1, 2), lambda: 0):
        with pytest.raises(TypeError, match="a part of a run"):
            pack(wrong)
