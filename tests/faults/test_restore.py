"""What a checkpoint is restored into, and what it is of: the same, or an error with what is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import ABOUT, bits, copied, edited, signed, template, tree

from gradhpo import GradhpoWarning, checkpoint
from gradhpo.checkpoint import CheckpointDamaged, CheckpointMismatch, reader

MUSEUM = Path(__file__).parent / "museum"


@pytest.mark.parametrize("change, match", [
    ({"w": jnp.zeros((3, 2), "f4")}, r"leaf \['w'\] is float32\[2, 3\] in .*0040, but float32\[3"),
    ({"w": jnp.zeros((2, 3), jnp.int32)}, r"float32\[2, 3\] in .*, but int32\[2, 3\]"),
    ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, "but bfloat16"),
    ({"half": jnp.zeros(5, "f4")}, r"bfloat16\[5\] in .*, but float32\[5\]"),
    ({"host": np.zeros(4, np.int32)}, r"int64\[4\] in .*, but int32\[4\] in the template"),
    ({"key": jax.random.PRNGKey(0)}, r"leaf \['key'\] is key<.*, but uint32\[2\]"),
    ({"key": jax.random.key(0, impl="rbg")}, r"but key<rbg>"),
    ({"legacy": jax.random.key(0)}, r"leaf \['legacy'\] is uint32\[2\] in .*, but key<"),
    ({"empty": jnp.zeros((0, 4), "f4")}, r"float32\[0, 3\] in .*, but float32\[0, 4\]"),
    ({"zzz": 1.0}, r"step-0000000040 has no leaf \['zzz'\]"),
    ({"aaa": 1.0}, r"holds leaf \['empty'\] .* where the template has \['aaa'\]"),
    ({"nothing": jnp.zeros(1)}, r"has \['nothing'\]"),
])  # fmt: skip
def test_21_other_template_is_refused_by_name(run, change, match):
    with pytest.raises(CheckpointMismatch, match=match) as error:
        checkpoint.restore(run, template() | change)
    assert "make it by init" in str(error.value)


def test_21_template_without_a_leaf_is_refused(run):
    less = template()
    del less["w"]
    with pytest.raises(CheckpointMismatch, match=r"the template has no leaf \['w'\]"):
        checkpoint.restore(run, less)


def test_20_newer_format_is_refused_and_told_apart_from_damage(run):
    newest = run / "step-0000000040"
    edited(newest, lambda content: content.update(format=2))
    with pytest.raises(CheckpointMismatch, match="format 2, and this gradhpo reads up to 1: updat"):
        checkpoint.restore(run, template())
    with checkpoint.writing(run) as writer, pytest.raises(CheckpointMismatch):
        writer.newest()
    assert checkpoint.steps(run) == [20, 40]  # an update of gradhpo can read it


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{}", "null", "[" * 10**5, '{"format": "1"}', "1" * 10**4]
)
def test_20_foreign_file_is_no_manifest(run, text):
    (run / "step-0000000040" / "manifest.json").write_text(text)
    signed(run / "step-0000000040")
    with pytest.warns(GradhpoWarning, match="manifest.json is no manifest of gradhpo"):
        assert bits(checkpoint.restore(run, template())) == bits(tree(20))


@pytest.mark.parametrize("name, value", [
    ("step", "40"), ("step", None), ("step", 2.5), ("about", []), ("position", 1), ("metrics", "x"),
    ("environment", None), ("leaves", {}), ("more", 1),
])  # fmt: skip
def test_20_manifest_of_other_types_is_none(run, name, value):
    edited(run / "step-0000000040", lambda content: content.update({name: value}))
    with pytest.warns(GradhpoWarning, match="manifest.json is no manifest of gradhpo"):
        assert bits(checkpoint.restore(run, template())) == bits(tree(20))


@pytest.mark.parametrize("name, value", [
    ("dtype", "object"), ("dtype", "float128"), ("dtype", "V8"), ("dtype", 3), ("dtype", "<M8[s]"),
    ("shape", [-1]), ("shape", 6), ("shape", ["6"]), ("shape", [1e9]), ("shape", [2**80, 0]),
    ("path", 1), ("sha256", None), ("more", 1),
])  # fmt: skip
def test_20_leaf_of_a_manifest_that_is_none(run, name, value):
    newest = run / "step-0000000040"
    edited(newest, lambda content: content["leaves"][1].update({name: value}))
    with pytest.warns(GradhpoWarning, match="manifest.json is no manifest of gradhpo"):
        assert bits(checkpoint.restore(run, template())) == bits(tree(20))


def test_16_other_settings_are_refused_with_the_list(run):
    assert checkpoint.restore(run, template(), about=ABOUT)
    with pytest.raises(CheckpointMismatch, match="T: 3 -> 4; rate: .nothing. -> 0.5"):
        checkpoint.restore(run, template(), about=ABOUT | {"T": 4, "rate": jnp.float32(0.5)})


def test_17_other_environment_is_told_and_other_floats_are_refused(run):
    newest = run / "step-0000000040"
    change = {"jax": "0.0.1", "devices": 99, "XLA_FLAGS": "--other"}
    edited(newest, lambda content: content["environment"].update(change))
    with pytest.warns(GradhpoWarning, match="in another environment.*bits may differ") as warned:
        assert bits(checkpoint.restore(run, template())) == bits(tree(40))
    for part in (f"jax: 0.0.1 -> {jax.__version__}", "devices: 99 -> ", "XLA_FLAGS: --other -> "):
        assert part in str(warned[0].message)
    wide = "False" if jax.config.read("jax_enable_x64") else "True"
    edited(newest, lambda content: content["environment"].update(jax_enable_x64=wide))
    with pytest.raises(CheckpointMismatch, match=f"jax_enable_x64={wide}, and now it is"):
        checkpoint.restore(run, template())


def test_17_programs_of_another_version_are_not_compared(run):
    newest = run / "step-0000000040"
    edited(newest, lambda content: content["about"].update(programs={"update": "1"}))
    about = ABOUT | {"programs": {"update": "2"}}
    with pytest.raises(CheckpointMismatch, match="programs.update: 1 -> 2"):
        checkpoint.restore(run, template(), about=about)
    edited(newest, lambda content: content["environment"].update(jax="0.0.1"))
    for ours in (about, ABOUT):
        with pytest.warns(GradhpoWarning, match="another environment"):
            checkpoint.restore(run, template(), about=ours)


@pytest.mark.parametrize("path", sorted(MUSEUM.glob("*")), ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:.*was saved in another environment")
@pytest.mark.skipif(jax.config.read("jax_enable_x64"), reason="they hold 32-bit floats")
def test_19_checkpoints_of_earlier_formats_are_read(path, tmp_path):
    directory = copied(path, tmp_path / "run")
    assert bits(checkpoint.restore(directory, template(), about=ABOUT)) == bits(tree(7))
    with checkpoint.writing(directory) as writer:
        writer.save(tree(8), step=8)
    assert checkpoint.steps(directory) == [7, 8]


def test_19_museum_has_this_format():
    assert (MUSEUM / f"format-{checkpoint.manifest.FORMAT}").is_dir()


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gradhpo import checkpoint
assert jax.device_count() == 2
mesh = Mesh(jax.devices(), ("x",))
cut = lambda x: jax.device_put(x, NamedSharding(mesh, P("x")))
state = {"w": cut(jnp.arange(8.0)), "keys": cut(jax.random.split(jax.random.key(1), 2))}
checkpoint.save(sys.argv[1], state, step=1)
template = {"w": cut(jnp.zeros(8)), "keys": cut(jax.random.split(jax.random.key(0), 2))}
got = checkpoint.restore(sys.argv[1], template)
for name in state:
    assert got[name].sharding == state[name].sharding, name
    plain = (lambda x: x) if name == "w" else jax.random.key_data
    np.testing.assert_array_equal(plain(got[name]), plain(state[name]))
loose = checkpoint.restore(sys.argv[1], {"w": jnp.zeros(8), "keys": template["keys"]})
assert len(loose["w"].sharding.device_set) == 1
"""


@pytest.mark.slow
@pytest.mark.faults
def test_59_sharded_state_comes_back_where_the_template_lies(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 17: another number of devices is told of
    with pytest.warns(GradhpoWarning, match="devices: 2 -> 1"):
        w, _ = (
            checkpoint.load(tmp_path)[0]["['w']"],
            checkpoint.restore(
                tmp_path, {"w": jnp.zeros(8), "keys": jax.random.split(jax.random.key(0), 2)}
            ),
        )
    assert w.tolist() == list(range(8))


def test_68_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    path = checkpoint.save(tmp_path, {"w": 1.0}, step=1)
    assert not any(b"hunter2" in file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert json.loads((path / "manifest.json").read_text())["environment"]["jax"]


def test_20_error_of_a_missing_step_lists_those_there_are(run):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 30 in .*are: 20, 40"):
        checkpoint.restore(run, template(), step=30)
    with pytest.raises(CheckpointDamaged, match="0020: manifest.json is missing"):
        (run / "step-0000000020" / "manifest.json").unlink()
        checkpoint.restore(run, template(), step=20)  # that one was asked for, and no other


def test_05_one_that_its_writer_removes_meanwhile_is_missing_and_not_damaged(run, monkeypatch):
    def removed(path, avals):
        shutil.rmtree(run / "step-0000000020")
        raise FileNotFoundError(path)

    monkeypatch.setattr(reader, "read_arrays", removed)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 20"):
        checkpoint.restore(run, template(), step=20)
