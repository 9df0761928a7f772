"""What a run has found, as files: hyperparameters by name, and the optimizer that they make."""

import json
import math
from collections.abc import Sequence
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
        Values in the scale of `task.hyperparams`, for `task.optimizer(...)`, or to train with:
        `task.replace(hyperparams=..., space=None)`. Discrete ones are decided, and no place for a
        space to start from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, has no such seed, or has other leaves or shapes than `like`;
            the message names the first.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    seeds, best = _read(file)
    number = str(best if seed is None else seed)
    if number not in seeds:
        raise ValueError(f"{file} has no seed {number}; its seeds are {', '.join(seeds)}.")
    found, wanted = seeds[number], named_leaves(like)
    if differ := sorted(wanted.keys() ^ found.keys()):
        raise ValueError(
            f"{file} has the leaves {', '.join(found)}, but {', '.join(wanted)} are wanted; the "
            f"first that differs is {differ[0]!r}."
        )
    leaves = []
    for name, leaf in wanted.items():
        try:
            with np.errstate(over="ignore"):  # it becomes infinite, which is refused
                value = np.asarray(found[name], float).astype(np.asarray(leaf).dtype)
        except (OverflowError, TypeError, ValueError):
            value = np.full(np.shape(leaf), np.nan)
        if not np.isfinite(value).all():
            raise ValueError(f"leaf {name!r} of {file} holds something else than finite numbers.")
        if value.shape != np.shape(leaf):
            raise ValueError(
                f"leaf {name!r} of {file} has shape {value.shape}, but {np.shape(leaf)} is wanted."
            )
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The values of every seed, and the number of the best."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        seeds = {number: dict(seed["values"]) for number, seed in content["seeds"].items()}
        return seeds, int(content["best_seed"])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} was not written by gradhpo tune ({type(error).__name__}: {error})."
        ) from None


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
