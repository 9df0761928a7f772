"""The finished parts of a run, kept in its directory until all of it is there.

    found = once("mnist, seed 0, greedy", train, setting, data, types=(Found,))

A study is a loop over parts that do not depend on each other: a method in a setting, on a seed.
Within `keeping`, as in `gradhpo run`, each is written to the directory when it is done, and a later
process that goes on there takes it instead of computing it:

    DIR/unfinished/run.json         what is run: the study, its settings, the versions
    DIR/unfinished/NAME-DIGEST.json   a part, with the SHA-256 of what it says
    DIR/run.json                    in place of all that, when the results are written
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gradhpo.checkpoint.lock import only_writer
from gradhpo.report.config import Progress
from gradhpo.report.files import RUN, UNFINISHED, unfinished_parts
from gradhpo.report.packing import pack, unpack
from gradhpo.report.provenance import versions
from gradhpo.report.results import plain
from gradhpo.utils._differences import differences
from gradhpo.utils._files import publish

__all__ = ["Parts", "finished", "keeping", "once"]

T = TypeVar("T")
Types = tuple[type, ...]

WHERE = ("out", "overwrite", "resume")  # settings that no number depends on


def once(name: str, function: Callable[..., T], *arguments: Any, types: Types = ()) -> T:
    """`function(*arguments)`, or what it was when an earlier process of the same run called it.

    Args:
        name: Of the part; no other part of the run has it.
        function: Deterministic; what it returns depends on the settings of the run alone, and not
            on whether other parts have been computed before. Times may differ.
        types: NamedTuples and dataclasses in what it returns, which consists of these, containers,
            numbers, text and arrays. Arrays are NumPy's, whether they were on disk or not.

    >>> import numpy as np
    >>> once("a sum", np.add, np.ones(2), 1)
    array([2., 2.])
    """
    parts = _parts.get()
    if parts is None:
        return unpack(pack(function(*arguments), types), types)
    return parts.once(name, partial(function, *arguments), types)


class Parts:
    """The parts of one run; see `keeping`.

    Attributes:
        seconds: What the parts that were on disk had taken, when they were computed.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], tell: Progress) -> None:
        self.folder, self.tell, self.seconds = folder, tell, 0.0
        self._run = _digest({key: run[key] for key in ("study", "settings")})
        self._names: set[str] = set()

    def once(self, name: str, compute: Callable[[], T], types: Types) -> T:
        """See the function `once`."""
        if name in self._names:
            raise ValueError(f"two parts of this run are {name!r}: is a setting given twice?")
        self._names.add(name)
        readable = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")[:80]
        path = self.folder / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"
        if path.exists():
            try:
                content = self._read(path, name)
                value = unpack(content["value"], types)
                self.seconds += content["seconds"]
                return value
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.tell(f"{path} is damaged ({error}); this part is computed again")
        began = time.perf_counter()
        value = pack(compute(), types)
        seconds = time.perf_counter() - began
        content = {"name": name, "run": self._run, "seconds": seconds, "value": value}
        text = json.dumps({"sha256": _digest(content), "content": content}, indent=1) + "\n"
        publish(path, lambda path: path.write_text(text, encoding="utf-8", newline=""))
        return unpack(value, types)

    def _read(self, path: Path, name: str) -> dict[str, Any]:
        found = json.loads(path.read_bytes())
        content = found["content"]
        if found["sha256"] != _digest(content):
            raise ValueError("its SHA-256 is another")
        if (content["name"], content["run"]) != (name, self._run):
            raise ValueError("it is a part of another run")
        return content

    def finish(self) -> None:
        """The results are written: what was asked for stays, the parts go."""
        (self.folder / RUN).replace(self.folder.with_name(RUN))
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def keeping(
    out: Path, study: str, config: Any, tell: Progress, resume: bool = False
) -> Iterator[Parts]:
    """Within it, `once` keeps the parts of a run, and takes those that are there with `resume`.

    Args:
        out: The directory of the run, see `output_directory`; without `resume`, parts of an earlier
            run there are removed.
        study, config: What is run.
        tell: Told how much there is already, of damaged parts and of other versions.

    Raises:
        DirectoryBusy: another process runs there; names it.
        FileNotFoundError: there is nothing to go on with.
        ValueError: there is, but it is another study, or has other settings; names them.
    """
    folder, run = out / UNFINISHED, {"study": study, "settings": _settings(config)}
    run["versions"] = versions()
    if resume and not (folder / RUN).is_file():
        raise FileNotFoundError(f"{out} holds no run to go on with; without --resume one is begun.")
    folder.mkdir(exist_ok=True)
    with only_writer(folder):
        if resume:
            _go_on(out, run, tell)
        else:
            _begin(out, run)
        parts = Parts(folder, run, tell)
        token = _parts.set(parts)
        try:
            yield parts
        except BaseException:
            if there := unfinished_parts(out):
                tell(f"{len(there)} finished parts are kept in {folder}: go on with --resume")
            else:
                shutil.rmtree(folder, ignore_errors=True)  # in nobody's way
            raise
        finally:
            _parts.reset(token)


def _begin(out: Path, run: Mapping[str, Any]) -> None:
    for path in unfinished_parts(out):
        path.unlink()
    text = json.dumps(run, indent=1) + "\n"
    publish(out / UNFINISHED / RUN, lambda path: path.write_text(text, encoding="utf-8"))


def _go_on(out: Path, run: Mapping[str, Any], tell: Progress) -> None:
    begun = _read_run(out / UNFINISHED / RUN)
    _refuse_other(begun, run, out)
    changed = "; ".join(differences(begun.get("versions", {}), run["versions"]))
    if changed:
        tell(f"the finished parts may differ in their last bits from what follows: {changed}")
    tell(f"going on with {len(unfinished_parts(out))} finished parts in {out / UNFINISHED}")


def finished(out: Path, study: str, config: Any) -> bool:
    """Whether a directory holds the results of this very run.

    Raises:
        ValueError: it holds those of another study, or of one with other settings; names them.
    """
    if not (out / RUN).is_file() or (out / UNFINISHED / RUN).is_file():
        return False
    _refuse_other(_read_run(out / RUN), {"study": study, "settings": _settings(config)}, out)
    return True


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in plain(config).items() if key not in WHERE}


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if {"study", "settings"} <= found.keys() and isinstance(found["settings"], dict):
            return found
    except (ValueError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: the run cannot go on. Begin anew with --overwrite.")


def _refuse_other(there: Mapping[str, Any], run: Mapping[str, Any], out: Path) -> None:
    if there["study"] != run["study"]:
        raise ValueError(f"{out} holds a run of {there['study']}, not of {run['study']}.")
    changed = "; ".join(differences(there["settings"], run["settings"]))
    if changed:
        raise ValueError(
            f"the run in {out} has other settings, and runs do not mix: {changed}. Give those that "
            "it was begun with, or begin another in another directory with --out."
        )


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)
