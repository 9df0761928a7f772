"""Where the trainings of a command are kept, so that a run that was cut off goes on.

    seed0-tuned/episodes.jsonl            of a training, a line for every episode
    seed0-tuned/step-0000000200/          its state, see `gradhpo.checkpoint`
    seed1-tuned/trainings.jsonl           of trainings in a row, a line for every one
    seed1-tuned/training003/              one of them, as above

A state says where a training stands, the lines what happened on the way. Lines are not flushed to
the disk one by one: where a power failure has taken some, the states after them are set aside.
"""

import dataclasses
import math
import re
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradhpo.checkpoint import Checkpoints, restore, steps
from gradhpo.checkpoint.directory import is_own, set_aside
from gradhpo.core.state import BilevelState
from gradhpo.tuning.journal import Done, Journal, LogRow
from gradhpo.utils._files import not_a_link, whose
from gradhpo.utils.validation import complain

__all__ = ["NOWHERE", "Place", "Sequence"]

EVERY = 30.0  # seconds between two states that are saved
EPISODES, TRAININGS = "episodes.jsonl", "trainings.jsonl"
JOURNAL = re.compile(r"(episodes|trainings)\.jsonl(\.damaged(-\d+)?)?")
PART = re.compile(r"training\d{3,}")


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory of one training, or of several in a row; without a path nothing is kept.

    Attributes:
        begun: Called after every episode: from the first one on there is something to go on from.
        run: Whose trainings they are; lines of another run are not read.
    """

    path: Path | None = None
    begun: Callable[[], None] = lambda: None
    run: str = ""

    @property
    def there(self) -> bool:
        """Whether it holds a state."""
        return self.path is not None and bool(steps(self.path))

    @property
    def used(self) -> bool:
        """Whether it holds a state or a line of any training."""
        return (
            self.there
            or any(JOURNAL.fullmatch(path.name) for path in self._own())
            or any(self._at(path).used for path in self._parts())
        )

    def part(self, i: int) -> "Place":
        """Of training `i` in a row."""
        return self if self.path is None else self._at(not_a_link(self.path / f"training{i:03d}"))

    def unkept(self) -> "Place":
        """The same, without a path."""
        return dataclasses.replace(self, path=None)

    def episodes(self) -> Journal[LogRow]:
        """Of a training. States that are ahead of it are set aside, and lines without one go."""
        if self.path is None:
            return Journal(LogRow)
        journal = Journal(LogRow, self.path / EPISODES, self.run)
        last = journal.rows[-1].step if journal.rows else -1
        for step in steps(self.path):
            if step > last:
                moved = set_aside(self.path, step)
                complain(
                    f"{self.path / EPISODES} ends at step {last}: the state of step {step} is of "
                    f"no use, and is now {moved.name}.",
                    strict=False,
                )
        if not self.there:
            journal.cut(0)
        return journal

    def trainings(self) -> Journal[Done]:
        """Of trainings in a row."""
        return Journal(Done, None if self.path is None else self.path / TRAININGS, self.run)

    def checkpoints(self, **about: Any) -> Checkpoints | None:
        """For `gradhpo.tune`. Whose turn it is here, the lock of the command says."""
        if self.path is None:
            return None
        return Checkpoints(directory=self.path, seconds=EVERY, about=about, takeover=True)

    def remove(self) -> None:
        """Remove what is kept here. Files of others stay, and no link is followed."""
        self.thin(spared=())
        for path in self._own():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        self._leave()

    def move(self, to: Path) -> None:
        """Move it elsewhere, but for files of others, and nothing through a link."""
        for path in self._parts():
            self._at(path).move(to / path.name)
        for path in self._own():
            to.mkdir(parents=True, exist_ok=True)
            path.replace(to / path.name)
        self._leave()

    def thin(self, spared: Collection[int], upto: float = math.inf) -> None:
        """Remove the states of trainings in a row, up to one of them, but for those spared."""
        for path in self._parts():
            i = int(path.name.removeprefix("training"))
            if i not in spared and i <= upto:
                self._at(path).remove()

    def _at(self, path: Path) -> "Place":
        return dataclasses.replace(self, path=path)

    def _own(self) -> list[Path]:
        return [path for path in self._content() if _is_journal(path) or is_own(path)]

    def _parts(self) -> list[Path]:
        found = (path for path in self._content() if PART.fullmatch(path.name))
        return [path for path in found if not path.is_symlink()]

    def _content(self) -> list[Path]:
        """Of the directory, if it is one and no link."""
        path = self.path
        return [] if path is None or path.is_symlink() or not path.is_dir() else [*path.iterdir()]

    def _leave(self) -> None:
        if self.path is not None and not self.path.is_symlink():
            with suppress(OSError):  # something of others is in there
                self.path.rmdir()


def _is_journal(path: Path) -> bool:
    return JOURNAL.fullmatch(whose(path)) is not None and not path.is_dir()


NOWHERE = Place()


class Sequence:
    """Trainings in a row, which one process after the other goes on with.

    Of every training that is done there is a line. States are kept of the first, by which a task
    that has changed is found out, of those that the caller names, and of none more often than
    every `EVERY` seconds: what lies between is trained again.
    """

    def __init__(self, place: Place):
        self._place, self._journal = place, place.trainings()
        self._since = -EVERY

    def done(self, i: int) -> Done | None:
        """What an earlier process has found in training `i`, if it has been done."""
        rows = self._journal.rows
        return rows[i] if i < len(rows) else None

    def kept(self, i: int) -> bool:
        """Whether there is a state of training `i`."""
        return self._place.part(i).there

    def newest(self, last: int) -> int:
        """The last training up to this one whose state is there, or else the first."""
        return max((i for i in range(last + 1) if self.kept(i)), default=0)

    def restore(self, i: int, like: BilevelState) -> BilevelState:
        """The state of training `i`, which is kept."""
        path = self._place.part(i).path
        assert path is not None
        return restore(path, like)

    def place(self, i: int) -> Place:
        """For training `i`."""
        own = self._place.part(i)
        due = i == 0 or time.monotonic() - self._since >= EVERY
        return own if due or own.there else own.unkept()

    def add(self, i: int, done: Done, needed: int) -> None:
        """Training `i` is done. Its state goes, and that of others, but for the one needed."""
        if i == len(self._journal.rows):
            self._journal.add(done)
        if self.kept(i):
            self._since = time.monotonic()
            self._place.thin(spared={0, needed}, upto=i)
