"""The task that a command line names: `module:attribute`, and settings for it."""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.core.task import Task
from gradhpo.tuning.names import named_leaves

__all__ = ["Target", "check_begins_anew", "load", "load_task", "setting"]


class Target(NamedTuple):
    """A task for every seed."""

    name: str
    make: Callable[[int], Task]
    seeded: bool  # False: the same task for every seed
    made: bool = True  # False: one object, whose sources go on from training to training


def check_begins_anew(name: str, task: Task) -> None:
    """Refuse a task that is trained more than once from sources that are functions.

    Raises:
        ValueError: it has some.
    """
    sources = {"train": task.train, "val": task.val}
    if going := [side for side, source in sources.items() if callable(source)]:
        raise ValueError(
            f"{name} is trained several times, each time on the same batches, but its "
            f"{' and '.join(going)} source is a function, which goes on: give a function that "
            "makes the task anew."
        )


def load(name: str, settings: Sequence[str] = ()) -> Target:
    """The task, or the function that makes it, under that name.

    Args:
        name: `module:attribute`, of a module that Python finds, the current directory included. The
            attribute is a `gradhpo.Task`, or a function that returns one; where the function takes
            `seed`, it is called with the number of the seed.
        settings: Words `NAME=VALUE`. NAME is an argument of that function, or a leaf of the
            hyperparameters, which then starts at VALUE; a Python literal, or else text.

    Raises:
        ValueError: the name has another form, the module has no such attribute, or a setting has
            no place; the message says what there is.
        TypeError: the attribute, or what it returns, is no task.
        ModuleNotFoundError: there is no such module.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute.isidentifier()):
        raise ValueError(
            f"a task is named MODULE:NAME, such as my_task:task for the function or task called "
            f"task in my_task.py, not {name!r}."
        )
    if module_name.endswith(".py") or os.sep in module_name:
        stem = module_name.removesuffix(".py").replace(os.sep, ".").strip(".")
        raise ValueError(
            f"{module_name!r} is a file; name the module as in an import, {stem}:{attribute}, in "
            "the directory that it is found from."
        )
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"{module_name!r} is no name of a module, as in `import {attribute}_task`."
        )
    found = _attribute(_module(module_name), attribute)
    values = dict(map(setting, settings))
    if isinstance(found, Task):
        task = _started(found, values)
        return Target(name, lambda seed: task, seeded=False, made=False)
    return _of_function(name, found, values)


def load_task(name: str, settings: Sequence[str] = (), seed: int = 0) -> Task:
    """The task that `gradhpo tune` calls by this name, with the same settings.

    Args:
        name: `module:attribute`; the module is looked for in the current directory as well.
        settings: NAME=VALUE, as after `--set`.
        seed: For a function that takes one.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: there is no such task; see `gradhpo tune`.
    """
    return load(name, settings).make(seed)


def _of_function(name: str, function: Callable[..., Any], values: Mapping[str, Any]) -> Target:
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    own = {key: value for key, value in values.items() if takes_all or key in parameters}
    starts = {key: value for key, value in values.items() if key not in own}
    seeded = "seed" in parameters and "seed" not in own
    empty = inspect.Parameter.empty
    open_ones = [
        key
        for key, each in parameters.items()
        if each.default is empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    if missing := [key for key in open_ones if key not in (*own, "seed")]:
        raise ValueError(
            f"{name} takes {', '.join(missing)}: a function that makes a task is called with seed "
            "alone, and with what --set gives it."
        )

    def make(seed: int) -> Task:
        task = function(**own, **({"seed": seed} if seeded else {}))
        if not isinstance(task, Task):
            raise TypeError(
                f"{name} must return a gradhpo.Task, but returned {type(task).__name__}."
            )
        return _started(task, starts, tuple(parameters))

    return Target(name, make, seeded)


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # an import within the module: a mistake of its own
        raise ModuleNotFoundError(
            f"there is no module {name!r} in {here} or among the installed ones; run the command "
            "in the directory of its file."
        ) from None


def _attribute(module: ModuleType, name: str) -> Any:
    found = getattr(module, name, None)
    if isinstance(found, Task) or (callable(found) and not isinstance(found, type)):
        return found
    there = [key for key, value in vars(module).items() if isinstance(value, Task)]
    there += [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    problem = (
        f"has no {name!r}" if found is None else f"has {name!r}, but it is {type(found).__name__}"
    )
    raise ValueError(
        f"the module {module.__name__} {problem}; a gradhpo.Task or a function that returns one is "
        f"wanted. There are: {', '.join(there) or 'none'}."
    )


def setting(word: str) -> tuple[str, Any]:
    """`(name, value)` of a word NAME=VALUE; a Python literal, or else text.

    >>> setting("lr=3e-3"), setting("kind=cosine")
    (('lr', 0.003), ('kind', 'cosine'))
    """
    name, equals, text = word.partition("=")
    if not (name and equals):
        raise ValueError(f"a setting is NAME=VALUE, not {word!r}.")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def _started(task: Task, values: Mapping[str, Any], parameters: Sequence[str] = ()) -> Task:
    """The task with other values for its hyperparameters to start from."""
    if not values:
        return task
    leaves, structure = jax.tree.flatten(task.hyperparams)
    names = list(named_leaves(task.hyperparams))
    for name, value in values.items():
        if name not in names:
            arguments = f"the task's function takes {', '.join(parameters)}; " if parameters else ""
            raise ValueError(
                f"--set {name}=... has no place: {arguments}its hyperparameters are "
                f"{', '.join(names)}."
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--set {name}={value!r}: a hyperparameter starts at a number.")
        i = names.index(name)
        leaves[i] = np.full_like(np.asarray(leaves[i]), value)
    return task.replace(hyperparams=jax.tree.unflatten(structure, leaves))
