"""Names of data sets, and where their loaders live.

A loader's module is imported when the set is first asked for, so that importing
`gradhpo` needs neither scikit-learn, Pillow nor pooch.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from os import PathLike
from typing import Any

from gradhpo.datasets.dataset import Dataset

__all__ = ["available", "load", "loader"]

_FROM_FILES = {
    "a9a": "sparse_text",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "fashion_mnist": "idx",
    "ijcnn1": "sparse_text",
    "mnist": "idx",
    "omniglot": "characters",
}
_BUILT_IN = {"digits": "builtin", "gaussian_clusters": "builtin"}


def available() -> tuple[str, ...]:
    """Names that `load` accepts, sorted.

    >>> "mnist" in available()
    True
    """
    return tuple(sorted(_FROM_FILES | _BUILT_IN))


def loader(name: str) -> Callable[..., Dataset]:
    """The loader function of a data set.

    Raises:
        ValueError: no such set; the message lists those there are.

    >>> loader("digits").__name__
    'digits'
    """
    modules = _FROM_FILES | _BUILT_IN
    if name not in modules:
        close = get_close_matches(name, modules, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"No data set {name!r}; available: {', '.join(available())}.{hint}")
    return getattr(import_module(f"gradhpo.datasets.{modules[name]}"), name)


def load(name: str, data_dir: str | PathLike[str] | None = None, **options: Any) -> Dataset:
    """Load a data set by name.

    Args:
        name: One of `available()`; `-` may stand for `_`.
        data_dir: Folder that holds a folder per set, `<data_dir>/<name>/`. If
            None, the environment variable GRADHPO_DATA is used, then the
            download cache. Sets that need no files ignore it.
        options: Passed on to the set's own loader.

    Raises:
        ValueError: unknown name.
        DatasetError: files missing, damaged or of the wrong digest.
        ImportError: an optional library is missing.

    >>> data = load("gaussian-clusters", num_train=6, num_features=2)
    >>> data.train.inputs.shape
    (6, 2)
    """
    name = name.replace("-", "_")
    function = loader(name)
    if name in _BUILT_IN:
        return function(**options)
    return function(data_dir=data_dir, **options)
