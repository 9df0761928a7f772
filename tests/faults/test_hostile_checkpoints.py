"""Checkpoints made to do harm, with digests that fit: no code is run, nothing outside is touched,
and nothing is allocated that the files do not justify."""

import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from checkpoint_cases import bits, edited, files, signed, template, tree

import gradhpo
from gradhpo import GradhpoWarning, checkpoint
from gradhpo.checkpoint import CheckpointDamaged

# Orbax opens arrays side by side, and when one fails it does not wait for the others.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in")

HUGE = 10**12


@pytest.fixture
def little_memory():
    """4 GB more than there are in use; what a test allocates beyond is an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_61_pickle_in_any_file_is_not_loaded(run, tmp_path):
    newest, payload = run / "step-0000000040", pickle.dumps(Payload(tmp_path / "ran"))
    for file in files(newest):
        before = file.read_bytes()
        file.write_bytes(payload)
        if file.name != "SHA256SUMS":
            signed(newest)
        with pytest.raises(CheckpointDamaged):
            checkpoint.restore(run, template(), step=40)
            raise CheckpointDamaged("a file that says nothing of the state")
        file.write_bytes(before)
    assert not (tmp_path / "ran").exists()


def test_61_no_module_can_unpickle():
    """`pickle` may write; what reads, runs code. NumPy's own reader has to be told to."""
    loads = re.compile(
        r"pickle\.loads?\b|cPickle|dill|joblib\.load|marshal|shelve|torch\.load|allow_pickle=True|"
        r"yaml\.(unsafe_|full_)?load\b|(?<![\w.])(eval|exec)\("
    )
    for file in Path(gradhpo.__file__).parent.rglob("*.py"):
        found = [line for line in file.read_text().splitlines() if loads.search(line)]
        assert not found, (file, found)


def test_64_manifest_that_declares_more_than_there_is(run, little_memory):
    newest = run / "step-0000000040"
    index = next(i for i, name in enumerate(sorted(tree(0))) if name == "w") - 1  # no leaf: nothing
    edited(newest, lambda content: content["leaves"][index].update(shape=[HUGE]))
    declared = checkpoint.reader.intact(newest).manifest.leaves[index]
    assert (declared.path, declared.bytes) == ("['w']", 4 * HUGE)
    for read in (
        lambda: checkpoint.load(run, step=40),
        lambda: checkpoint.restore(run, FakeTemplate(run).tree, step=40),
    ):
        with pytest.raises(CheckpointDamaged, match=r"declares 4\d{12} bytes of arrays, but its"):
            read()


class FakeTemplate:
    """One that has the lie too: as when a template is made of what the manifest says."""

    def __init__(self, run):
        import jax

        self.tree = template() | {"w": jax.ShapeDtypeStruct((HUGE,), jnp.float32)}


def rewritten(path, name, change):
    """The same arrays, but `change` edits the metadata of one; the digests fit."""
    import tensorstore as ts

    spec = {"driver": "ocdbt", "base": f"file://{path / 'arrays'}/"}
    store = ts.KvStore.open(spec).result()
    key = f"{name}/.zarray"
    content = json.loads(store.read(key).result().value)
    change(content)
    store.write(key, json.dumps(content).encode()).result()
    signed(path)
    return store


@pytest.fixture
def large(tmp_path):
    """Of 100 000 floats; and the path of its checkpoint."""
    state = {"w": jnp.arange(100_000.0)}
    return state, checkpoint.save(tmp_path / "run", state, step=1)


def restored(state, path):
    return checkpoint.restore(path.parent, state)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"shape": [HUGE]}, "is not the one that the manifest declares"),
        ({"shape": [HUGE], "chunks": [HUGE]}, "is not the one that the manifest declares"),
        ({"chunks": [HUGE]}, "is cut into parts larger than its files|cannot be read"),
        ({"dtype": "<i2"}, "is not the one that the manifest declares"),
        ({"shape": [0]}, "is not the one that the manifest declares"),
        ({"shape": [-1]}, "where its arrays are cannot be read"),
        ({"chunks": [0]}, "where its arrays are cannot be read"),
        ({"dtype": "|O"}, "where its arrays are cannot be read"),
        ({"filters": [{"id": "pickle"}]}, "where its arrays are cannot be read"),
        ({"compressor": {"id": "zstd"}}, "cannot be read: .*ompress"),
    ],
)
def test_64_metadata_of_an_array_that_lies(large, little_memory, change, match):
    state, path = large
    rewritten(path, "000000", lambda content: content.update(change))
    with pytest.raises(CheckpointDamaged, match=match):
        restored(state, path)


def test_64_an_array_too_many(large, little_memory):
    """It is in no manifest, and declares a terabyte."""
    state, path = large
    store = rewritten(path, "000000", lambda content: None)
    lie = json.loads(store.read("000000/.zarray").result().value) | {"shape": [HUGE]}
    store.write("000001/.zarray", json.dumps(lie).encode()).result()
    metadata = path / "arrays" / "_METADATA"
    names = json.loads(metadata.read_text())
    names["tree_metadata"]["('000001',)"] = {
        **next(iter(names["tree_metadata"].values())),
        "key_metadata": [{"key": "000001", "key_type": 2}],
    }
    metadata.write_text(json.dumps(names))
    signed(path)
    with pytest.raises(CheckpointDamaged, match="array 000001 is not the one that the manifest"):
        restored(state, path)


def test_64_leaf_without_elements_may_be_of_any_shape(run):
    newest = run / "step-0000000040"
    edited(newest, lambda content: content["leaves"][0].update(shape=[0, 2**62]))
    with pytest.raises(CheckpointDamaged, match="step-0000000040"):
        checkpoint.load(run, step=40)


def test_64_metrics_that_declare_much_are_not_made(tmp_path, little_memory):
    state = gradhpo.BilevelState.create({"w": jnp.ones(2)}, {"lr": jnp.ones(())})
    more = state.update(metadata=state.metadata | {"val_extra": jnp.zeros(())})
    path = checkpoint.save(tmp_path, more, step=1)
    assert "val_extra" in checkpoint.restore(tmp_path, state).metadata

    def lie(content):
        leaf = next(x for x in content["leaves"] if "val_extra" in x["path"])
        leaf["shape"] = [HUGE]

    edited(path, lie)
    with pytest.raises(CheckpointDamaged, match="declares"):
        checkpoint.restore(tmp_path, state)


def test_64_manifest_too_large_is_not_parsed(run, monkeypatch):
    monkeypatch.setattr("gradhpo.checkpoint.manifest.MOST", 1000)
    with pytest.raises(CheckpointDamaged, match="manifest.json is larger than"):
        checkpoint.restore(run, template(), step=40)
    with pytest.raises(checkpoint.CheckpointError, match="leaves are too many for one manifest"):
        checkpoint.save(run, tree(60), step=60)  # nobody could read it
    monkeypatch.setattr("gradhpo.checkpoint.directory.MOST", 1000)
    with pytest.raises(CheckpointDamaged, match="SHA256SUMS is a link, no file or too large"):
        checkpoint.restore(run, template(), step=40)


@pytest.fixture
def outside(tmp_path):
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_text("precious")
    yield path
    assert [file.name for file in path.iterdir()] == ["precious"]
    assert (path / "precious").read_text() == "precious"


def test_65_link_in_place_of_a_checkpoint_is_none(run, outside):
    (run / "step-0000000060").symlink_to(run / "step-0000000040")
    (run / "step-0000000010").symlink_to(outside)
    assert checkpoint.steps(run) == [20, 40]
    with pytest.raises(FileNotFoundError):
        checkpoint.restore(run, template(), step=60)
    with checkpoint.writing(run) as writer:
        assert writer.newest().manifest.step == 40
        writer.save(tree(60), step=60)
        with pytest.raises(checkpoint.CheckpointError, match="cannot save step 60"):
            writer.wait()
        writer.save(tree(80), step=80)  # and prunes 20, not the link
    assert checkpoint.steps(run) == [40, 80]
    assert (run / "step-0000000010").is_symlink()


@pytest.mark.parametrize("what", ["file", "folder", "more", "list", "pipe"])
def test_65_link_within_a_checkpoint_is_damage_and_is_not_followed(run, outside, what):
    newest = run / "step-0000000040"
    if what == "file":
        file = newest / "manifest.json"
        shutil.copy(file, run / "copy")
        file.unlink()
        file.symlink_to(run / "copy")
    elif what == "folder":
        (newest / "arrays").rename(run / "arrays")
        (newest / "arrays").symlink_to(run / "arrays")
    elif what == "more":
        (newest / "arrays" / "more").symlink_to(outside)
    elif what == "pipe":  # reading it would wait for ever
        (newest / "SHA256SUMS").unlink()
        os.mkfifo(newest / "SHA256SUMS")
    else:
        (newest / "SHA256SUMS").rename(run / "copy")
        (newest / "SHA256SUMS").symlink_to(run / "copy")
    with checkpoint.writing(run, keep=1) as writer:
        with pytest.warns(GradhpoWarning, match="0040: .* is a link"):
            assert writer.newest().manifest.step == 20
        writer.save(tree(60), step=60)
    assert checkpoint.steps(run) == [60]


LEFT = ".unfinished-step-0000000060-0123456{}"


def test_65_links_among_what_is_swept_and_removed_are_not_followed(run, outside):
    for name in (LEFT.format("1"), LEFT.format("2"), ".7..going-on"):
        (run / name).symlink_to(outside)
    (run / ".8..going-on").touch()
    (run / ".9..going-on").symlink_to(run / "step-0000000020" / "manifest.json")
    for name in (LEFT.format("3"), ".unfinished-thesis"):
        (run / name).mkdir()
        (run / name / "link").symlink_to(outside)
    (run / "step-0000000020" / "link").symlink_to(outside)
    with checkpoint.writing(run, keep=1) as writer:
        writer.save(tree(60), step=60)
    assert not (run / LEFT.format("3")).exists() and not (run / ".8..going-on").exists()
    assert (run / LEFT.format("1")).is_symlink() and (run / ".7..going-on").is_symlink()
    assert (run / ".9..going-on").is_symlink()
    assert (run / ".unfinished-thesis").is_dir()  # somebody else's
    assert checkpoint.steps(run) == [60]


def test_65_dangling_link_in_the_way_of_a_damaged_one(run, outside):
    (run / "step-0000000040.damaged").symlink_to(outside / "nothing")
    (run / "step-0000000040" / "manifest.json").unlink()
    with checkpoint.writing(run) as writer:
        with pytest.warns(GradhpoWarning, match="It is now step-0000000040.damaged-1"):
            writer.newest()


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
def test_67_names_of_files_are_shown_without_control_characters(run):
    newest = os.fsencode(run / "step-0000000040")
    for name in (b"\x1b[31mred", b"caf\xe9", b"new\nline"):
        (Path(os.fsdecode(newest + b"/" + name))).write_text("x")
        with pytest.warns(GradhpoWarning, match="is not in SHA256SUMS") as warned:
            assert bits(checkpoint.restore(run, template())) == bits(tree(20))
        assert str(warned[0].message).isprintable() and str(warned[0].message).isascii()
        Path(os.fsdecode(newest + b"/" + name)).unlink()
    edited(run / "step-0000000040", lambda c: c["about"].update(T="\x1b[31m" + "x" * 10**5))
    with pytest.raises(checkpoint.CheckpointMismatch) as error:
        checkpoint.restore(run, template(), about={"method": "none", "T": 3})
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
