"""What a run has found, as files: hyperparameters by name, and the optimizer that they make."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradhpo.core.types import Hyper
from gradhpo.tuning.names import named_leaves

__all__ = ["FILE", "as_json", "load_hyperparams", "optimizer_file"]

FILE = "hyperparams.json"


def as_json(hyperparams: Hyper) -> dict[str, Any]:
    """The leaves by their names, as numbers and lists of them; None for what is not finite.

    >>> as_json({"rates": {"hidden": np.float32(0.5)}, "decay": np.arange(2.0)})
    {'decay': [0.0, 1.0], 'rates/hidden': 0.5}
    """
    leaves = named_leaves(jax.device_get(hyperparams)).items()
    return {name: _finite(_numbers(leaf)) for name, leaf in leaves}


def load_hyperparams(path: str | Path, like: Hyper, seed: int | None = None) -> Hyper:
    """The tuned hyperparameters of `gradhpo tune`, in the tree of the task's.

    Args:
        path: Its directory, or the file `hyperparams.json` in it.
        like: A tree of the same structure, such as `task.hyperparams`; dtypes are taken from it.
        seed: Of the run; None: the one with the lowest validation loss.

    Returns:
        Values in the scale of `task.hyperparams`, to start another task from:
        `task.replace(hyperparams=load_hyperparams(path, task.hyperparams))`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, has no such seed, or has other leaves or shapes than `like`;
            the message names the first.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    content = json.loads(file.read_text(encoding="utf-8"))
    try:
        found = content["seeds"][str(content["best_seed"] if seed is None else seed)]["values"]
    except (KeyError, TypeError):
        seeds = ", ".join(content.get("seeds", ())) if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{file} holds no hyperparameters of "
            f"{'the best seed' if seed is None else f'seed {seed}'}"
            f"{f'; its seeds are {seeds}' if seeds else ': gradhpo tune has not written it'}."
        ) from None
    wanted = named_leaves(like)
    if differ := sorted(set(wanted) ^ set(found)):
        raise ValueError(
            f"{file} has the leaves {', '.join(found)}, but {', '.join(wanted)} are wanted; the "
            f"first that differs is {differ[0]!r}."
        )
    leaves = []
    for name, leaf in wanted.items():
        value = np.asarray(found[name], np.asarray(leaf).dtype)
        if value.shape != np.shape(leaf):
            raise ValueError(
                f"leaf {name!r} of {file} has shape {value.shape}, but {np.shape(leaf)} is wanted."
            )
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def optimizer_file(target: str, settings: Sequence[str]) -> str:
    """Python that makes the tuned optimizer, to run where the module of the task is found.

    Args:
        target: `module:attribute`.
        settings: NAME=VALUE, those of the run.
    """
    arguments = ", ".join(map(repr, (target, *([list(settings)] if settings else []))))
    return f'''"""The optimizer of {target} with the hyperparameters that `gradhpo tune` has found.

`optimizer` is an Optax optimizer like any other: optimizer.init(params), optimizer.update(...).
"""

from pathlib import Path

from gradhpo.tuning import load_hyperparams, load_task

task = load_task({arguments})
hyperparams = load_hyperparams(Path(__file__).parent, task.hyperparams)
optimizer = task.optimizer(hyperparams)
'''


def _numbers(leaf: Any) -> Any:
    return np.asarray(leaf).tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if math.isfinite(value) else None
