"""Small checkpoints for tests, and what may be done to them."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo import checkpoint

ABOUT = {"method": "none", "T": 3}


def tree(step):
    """Something of every kind, other bits for every step."""
    return {
        "w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) + step,
        "half": jnp.full(5, step, jnp.bfloat16),
        "key": jax.random.key(step),
        "legacy": jax.random.PRNGKey(step),
        "host": np.arange(4) + step,
        "empty": jnp.zeros((0, 3), jnp.float32),
        "nothing": None,
    }


def template():
    return tree(0)


def bits(tree):
    """All leaves as bytes."""
    typed = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = [jax.random.key_data(x) if typed(x) else x for x in jax.tree.leaves(tree)]
    return [(np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()) for x in plain]


def saved(directory, *numbers):
    """The directory, with checkpoints of these steps."""
    with checkpoint.writing(directory, keep=len(numbers)) as writer:
        for step in numbers:
            writer.save(tree(step), step=step, about=ABOUT)
    return Path(directory)


def copied(directory, to):
    return Path(shutil.copytree(directory, to, symlinks=True))


def files(path):
    return sorted(file for file in Path(path).rglob("*") if file.is_file())


def signed(path):
    """The checkpoint with digests of what its files hold now, as an attacker would make them."""
    names = [file for file in files(path) if file.name != "SHA256SUMS"]
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(path).as_posix()}\n"
        for file in names
    ]
    text = "".join(sorted(lines, key=lambda line: line[66:]))
    (path / "SHA256SUMS").write_text(text, newline="")


def edited(path, change):
    """The checkpoint with another manifest, signed; `change` edits its content in place."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    signed(path)
