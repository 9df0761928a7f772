"""All trees that JAX takes come back bit for bit, and no name of a leaf becomes a path."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import bits, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradhpo import checkpoint
from gradhpo.checkpoint.leaves import check_matches, decoded, encoded, packed, unpacked

DTYPES = (
    "bool int4 uint4 int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 float8_e4m3fn "
    "float8_e5m2 complex64"
).split()
KEYS = st.one_of(
    st.sampled_from(
        ["../x", "/etc/x", "a/b", "a", "nul\0", "CON", ".", "..", "", "['a']", "a']['b", "x" * 5000]
    ),
    st.text(max_size=8),
    st.text(string.punctuation, max_size=4),
)


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["jax", "numpy", "key", "legacy", "number"]))
    seed = draw(st.integers(0, 2**16))
    if kind == "number":
        return draw(st.one_of(st.booleans(), st.integers(-(2**31), 2**31 - 1), st.just(0.5)))
    if kind in ("key", "legacy"):
        return (jax.random.key if kind == "key" else jax.random.PRNGKey)(seed)
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if dtype.name in ("bool", "int4", "uint4"):
        array = (raw[..., 0] % 2).astype(dtype)
    else:  # any bits, NaN with a payload among them
        array = np.ascontiguousarray(raw).view(dtype)[..., 0]
    return array if kind == "numpy" else jnp.asarray(array)


TREES = st.recursive(
    st.one_of(leaves(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2),
    ),
    max_leaves=8,
)


def emptied(tree):
    """A template of it."""

    def zero(x):
        if isinstance(x, np.ndarray):
            return np.zeros_like(x)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros_like(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(zero, tree)


def same(got, tree):
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    numbers = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, int | float) else x, tree)
    assert bits(got) == bits(numbers)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(numbers), strict=True):
        assert isinstance(a, np.ndarray) == isinstance(b, np.ndarray)


@given(TREES)
@settings(max_examples=40, deadline=None)
def test_22_every_tree_is_encoded_and_decoded(tree):
    pairs = encoded(tree)
    check_matches("it", emptied(tree), [leaf for leaf, _ in pairs])
    arrays = [unpacked(packed(array), leaf) for leaf, array in pairs]
    same(decoded(emptied(tree), [leaf for leaf, _ in pairs], arrays), tree)
    assert len({leaf.path for leaf, _ in pairs}) == len(pairs)  # none looks like another


@given(TREES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_22_62_every_tree_is_saved_and_restored_and_stays_inside(tmp_path_factory, tree):
    directory = tmp_path_factory.mktemp("tree") / "run"
    path = checkpoint.save(directory, tree, step=1)
    same(checkpoint.restore(directory, emptied(tree)), tree)
    assert [entry.name for entry in directory.iterdir()] == [path.name]
    plain = set(string.ascii_letters + string.digits + "._-")
    assert all(set(file.name) <= plain for file in files(path))
    assert [entry.name for entry in directory.parent.iterdir()] == ["run"]


def test_22_every_dtype_of_every_shape(tmp_path):
    tree = {
        f"{dtype} {shape}": np.ones(shape, jnp.dtype(dtype))
        for dtype in (*DTYPES, "int64", "uint64", "float64", "complex128", "float8_e4m3b11fnuz")
        for shape in ((), (3,), (0,), (2, 0, 3), (2, 3))
    }
    tree |= {"big": np.arange(3, dtype=">i4"), "turned": np.asfortranarray(np.eye(3)[:, :2])}
    checkpoint.save(tmp_path, tree, step=1)
    got = checkpoint.restore(tmp_path, tree | {"big": np.zeros(3, np.int32)})
    for name, array in tree.items():
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
    loaded, _ = checkpoint.load(tmp_path)
    assert loaded["['bfloat16 (3,)']"].dtype == jnp.bfloat16


def test_22_tree_of_nothing(tmp_path):
    tree = {"a": None, "b": [], "c": jnp.zeros((0, 2))}
    checkpoint.save(tmp_path, tree, step=1)
    same(checkpoint.restore(tmp_path, tree), tree)


def test_22_numbers_beyond_their_type_are_refused(tmp_path):
    if jax.config.read("jax_enable_x64"):
        pytest.skip("integers have 64 bits")
    with pytest.raises(ValueError, match=r"leaf \['n'\] is 1099511627776, which int32 cannot hold"):
        checkpoint.save(tmp_path, {"n": 2**40}, step=1)
