"""Reading checkpoints: the newest that is intact, restored strictly."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.checkpoint import directory as folder
from gradhpo.checkpoint.arrays import read_arrays
from gradhpo.checkpoint.environment import TRACING, environment
from gradhpo.checkpoint.errors import CheckpointDamaged, CheckpointMismatch
from gradhpo.checkpoint.leaves import check_matches, decoded, digest, packed, template_of, unpacked
from gradhpo.checkpoint.manifest import Manifest, as_json, read_manifest
from gradhpo.core.state import BilevelState
from gradhpo.utils._differences import differences
from gradhpo.utils.settings import check_count
from gradhpo.utils.validation import complain, leaves_with_names

__all__ = [
    "ARRAYS",
    "Found",
    "array_name",
    "check_about",
    "compare_environments",
    "intact",
    "load",
    "newest",
    "one_line",
    "restore",
    "steps",
]

ARRAYS = "arrays"


class Found(NamedTuple):
    """An intact checkpoint."""

    path: Path
    manifest: Manifest

    def restore(self, template: Any) -> Any:
        """Its content, in a tree like the template.

        Raises:
            CheckpointMismatch: the template has other leaves; names the first.
            CheckpointDamaged: the arrays are not those that were saved.
        """
        if isinstance(template, BilevelState):
            template = self._with_metrics(template)
        leaves = self.manifest.leaves
        check_matches(str(self.path), template, leaves)
        return decoded(template, leaves, self.arrays())

    def arrays(self) -> list[np.ndarray]:
        """Its leaves, in order.

        Raises:
            CheckpointDamaged: they are not those that were saved.
        """
        leaves = self.manifest.leaves
        avals = {array_name(i): (leaf.shape, _stored(leaf)) for i, leaf in _filled(leaves)}
        try:
            found = read_arrays(self.path / ARRAYS, avals)
            found |= {
                array_name(i): np.empty(leaf.shape, _stored(leaf))
                for i, leaf in enumerate(leaves)
                if not leaf.bytes
            }
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{self.path} is damaged: {error}.") from None
        except Exception as error:  # of any kind, from below Orbax
            raise CheckpointDamaged(f"{self.path} cannot be read: {one_line(error)}.") from error
        arrays = []
        for i, leaf in enumerate(leaves):
            array = found[array_name(i)]
            if digest(array) != leaf.sha256:
                raise CheckpointDamaged(
                    f"{self.path} is damaged: leaf {leaf.path} differs from its digest."
                )
            arrays.append(unpacked(array, leaf))
        return arrays

    def with_kept_batch(self, state: BilevelState, field: str) -> BilevelState:
        """A template for a method that keeps a batch in this field of its memory: of the types that
        the saved one had, which follow the data."""
        first = f".memory.{field}"
        saved = {leaf.path: leaf for leaf in self.manifest.leaves if leaf.path.startswith(first)}

        def fitting(path: str, leaf: Any) -> Any:
            if path not in saved:
                return leaf
            own = template_of(saved[path])
            return leaf if (own.shape, own.dtype) == (leaf.shape, leaf.dtype) else own

        leaves = [fitting(*each) for each in leaves_with_names(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def _with_metrics(self, state: BilevelState) -> BilevelState:
        """A template with the metrics of the saved state: `run` has made room for what the losses
        return beside their values, and `init` does not know of them."""
        first = ".metadata"
        kinds = {leaf.path: leaf for leaf in self.manifest.leaves if leaf.path.startswith(first)}
        metadata: dict[str, Any] = dict(state.metadata)
        for name in self.manifest.metrics:
            leaf = kinds.get(f"{first}[{name!r}]")
            if leaf is not None and name not in metadata:
                metadata[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return state.update(metadata=metadata)


def array_name(i: int) -> str:
    """Of a leaf in Orbax: a number, so that no name of a user's becomes a path."""
    return f"{i:06d}"


def _filled(leaves: list) -> list[tuple[int, Any]]:
    return [(i, leaf) for i, leaf in enumerate(leaves) if leaf.bytes]


def _stored(leaf: Any) -> str:
    return packed(np.empty(0, jax.numpy.dtype(leaf.dtype))).dtype.name


def one_line(error: BaseException) -> str:
    """An error on a line: how it begins, and its end, where the reason is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-200:]}"


def newest(directory: Path, *, set_aside: bool) -> Found | None:
    """The newest checkpoint that is intact; None where there is none at all.

    Args:
        set_aside: Whether damaged ones are renamed, as their one writer may.

    Raises:
        CheckpointDamaged: there are checkpoints, and none is intact.
    """
    found, damaged = None, {}
    for step in reversed(folder.numbers(directory)):
        try:
            found = intact(folder.path_of(directory, step))
            break
        except CheckpointDamaged as error:
            damaged[step] = error
    if damaged and any(not folder.path_of(directory, step).exists() for step in damaged):
        return newest(directory, set_aside=set_aside)  # a writer has removed it meanwhile
    if damaged and found is None:  # and all keep their names, else the next start found nothing
        reasons = "; ".join(str(error) for error in damaged.values())
        raise CheckpointDamaged(
            f"no checkpoint in {directory} is intact: {reasons}. Restore one from a backup, or "
            "begin anew in another directory."
        )
    for step, error in damaged.items():
        moved = ""
        if set_aside:
            try:
                moved = f" It is now {folder.set_aside(directory, step).name}."
            except OSError as refused:
                moved = f" It cannot be renamed: {refused.strerror}."
        complain(f"checkpoint {error}.{moved} An earlier one is taken.", strict=False)
    return found


def intact(path: Path) -> Found:
    """A checkpoint whose files are those that were written.

    Raises:
        CheckpointDamaged: they are not.
    """
    try:
        folder.verify(path)
        found = Found(path, read_manifest(path))
        if folder.path_of(path.parent, found.manifest.step) != path:
            raise CheckpointDamaged(f"it holds step {found.manifest.step}")
        return found
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"{path.name}: {error}") from None


def restore(
    directory: str | os.PathLike,
    template: Any,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Any:
    """A saved state, the newest that is intact; nothing is changed in the directory.

    Args:
        template: A state (or tree) of the same structure, shapes and dtypes, as `init` makes it.
        step: Which checkpoint; None: the newest.
        about: What the checkpoint has to be of; None: that is not looked at.

    Raises:
        FileNotFoundError: there is no checkpoint (of this step).
        CheckpointDamaged: none is intact.
        CheckpointMismatch: it is of something else; the message names the first difference.

    Warns:
        GradhpoWarning: newer ones are damaged, or the environment is another one.
    """

    def use(found: Found) -> Any:
        if about is not None:
            check_about(found, as_json(about, "about"))
        compare_environments(found)
        return found.restore(template)

    return _read(directory, step, use)


def load(
    directory: str | os.PathLike, *, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The leaves of a checkpoint by their paths, and what it is about, without a template.

    Raises:
        FileNotFoundError, CheckpointDamaged, CheckpointMismatch: as `restore`.
    """

    def use(found: Found) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        paths = [leaf.path for leaf in found.manifest.leaves]
        return dict(zip(paths, found.arrays(), strict=True)), found.manifest.about

    return _read(directory, step, use)


def steps(directory: str | os.PathLike) -> list[int]:
    """The numbers of the checkpoints there are, in order; whether they are intact is not looked at.

    >>> steps("no such directory")
    []
    """
    return folder.numbers(Path(directory).absolute())


def _read(directory: str | os.PathLike, step: int | None, use: Callable[[Found], Any]) -> Any:
    """`use` of a checkpoint; of a newer one, when a writer has removed it meanwhile."""
    while True:
        found = _found(Path(directory).absolute(), step)
        try:
            return use(found)
        except CheckpointDamaged:
            if found.path.exists():
                raise


def _found(directory: Path, step: int | None) -> Found:
    if step is None:
        found = newest(directory, set_aside=False)
    else:
        path = folder.path_of(directory, check_count("step", step, minimum=0))
        found = intact(path) if path.is_dir() and not path.is_symlink() else None
    if found is None:
        there = folder.numbers(directory)
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        steps = f" (steps there are: {', '.join(map(str, there))})" if there else ""
        raise FileNotFoundError(f"there is no {which} in {directory}{steps}.")
    return found


def check_about(found: Found, about: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Programs are compared as the same JAX and the same gradhpo trace them; with others they look
    different anyway, and `compare_environments` says that they were not.

    Raises:
        CheckpointMismatch: lists all that differs, old -> new.
    """
    before = found.manifest.about
    if not _traced_alike(found.manifest.environment, environment()):
        before, about = ({k: v for k, v in x.items() if k != "programs"} for x in (before, about))
    differing = differences(before, about)
    if differing:
        raise CheckpointMismatch(
            f"{found.path} is of another run: {'; '.join(differing)}. Go on with what it was made "
            "with, or begin anew in another directory."
        )


def _traced_alike(then: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(then.get(name) == now[name] for name in TRACING)


def compare_environments(found: Found) -> None:
    """Refuse another float width, tell of other differences.

    Raises:
        CheckpointMismatch: 64-bit floats are on here and were off there, or the reverse.

    Warns:
        GradhpoWarning: other versions, devices or settings.
    """
    before, now = found.manifest.environment, environment()
    name = "jax_enable_x64"
    if before.get(name) != now[name]:
        raise CheckpointMismatch(
            f"{found.path} was saved with {name}={before.get(name)}, and now it is {now[name]}: "
            f"set it as it was (jax.config.update('{name}', ...))."
        )
    differing = differences(before, now)
    if differing:
        unseen = "programs" in found.manifest.about and not _traced_alike(before, now)
        complain(
            f"{found.path} was saved in another environment: {'; '.join(differing)}. The run goes "
            "on, but its bits may differ from those of an uninterrupted one."
            + " Losses and optimizers could not be compared with those that it had."
            * unseen,
            strict=False,
        )
