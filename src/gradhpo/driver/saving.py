"""A run that saves its states, and goes on from them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradhpo.checkpoint.directory import GOING_ON
from gradhpo.checkpoint.errors import CheckpointError, CheckpointMismatch
from gradhpo.checkpoint.manifest import as_json
from gradhpo.checkpoint.reader import check_about, compare_environments
from gradhpo.checkpoint.settings import Checkpoints
from gradhpo.checkpoint.writer import Writer, writing
from gradhpo.core.estimator import Room
from gradhpo.core.state import BilevelState
from gradhpo.driver.data import Data
from gradhpo.driver.interruption import Signals
from gradhpo.utils._files import publish
from gradhpo.utils.validation import complain

__all__ = ["Saver", "saving"]


class Saver:
    """Saves the states of one run.

    Attributes:
        found: The checkpoint to go on from; None: the run begins.
        origin: Where sources of data stood when this run began, be it in another process.

    Raises:
        CheckpointMismatch: the checkpoint is none of a run.
    """

    def __init__(self, settings: Checkpoints, writer: Writer, data: Data):
        self._settings, self._writer = settings, writer
        self.found = writer.newest()
        if self.found is not None and "origin" not in self.found.manifest.position:
            raise CheckpointMismatch(
                f"{self.found.path} was saved by a loop of its own, and not by `run`: take "
                "another directory, or restore it and give it to `run` as the state."
            )
        self.origin = data.positions() if self.found is None else self._position["origin"]
        self._about: dict[str, Any] = {}
        self._latest: tuple[BilevelState, dict[str, Any]] | None = None  # not begun to be saved
        self._earlier = self._latest
        self._due = time.monotonic() + settings.seconds
        self._told = False

    def begin(
        self, about: dict[str, Any], template: BilevelState, episodes: int, room: Room | None
    ) -> BilevelState | None:
        """The state to go on from, now that the run knows itself; None: it begins.

        Args:
            about: What it is, by name.
            template: A state of its final structure, before the first episode.
            episodes: After how many it ends, counted from `init`.
            room: Where the memory keeps a batch, which looks as those of the latest episode.

        Raises:
            CheckpointMismatch: the checkpoint is of another run, or none between its beginning and
                its end.
        """
        own = self._settings.about
        self._about = about | ({"about": as_json(own)} if own else {})
        if self.found is None:
            return None
        compare_environments(self.found)
        try:
            check_about(self.found, as_json(self._about))
        except CheckpointMismatch as error:
            if not self._settings.accept_changes:
                raise
            complain(f"{error} It goes on, as accept_changes=True says.", strict=False)
        if room is not None:
            template = self.found.with_kept_batch(template, room.field)
        state = self.found.restore(template)
        first, now = int(template.episode), int(state.episode)
        if now < first:
            raise CheckpointMismatch(
                f"{self.found.path} is the state after episode {now}, and this run begins with one "
                f"after episode {first}: begin with an earlier one, or take another directory."
            )
        if now > episodes:
            raise CheckpointMismatch(
                f"{self.found.path} is the state after episode {now}, and this run ends after "
                f"episode {episodes}: ask for more episodes, or take another directory."
            )
        return state

    def after(self, state: BilevelState, data: Data, last: bool) -> None:
        """An episode has ended; its computation may still run. The last one of a run is saved by
        `finish` alone, so that its checkpoint says that no hook has been told of a later one."""
        self._earlier = self._latest  # computed, since the run has waited for it
        self._latest = state, {"origin": self.origin, "now": data.positions(), "last": last}
        patient = self._settings.seconds > 0  # else every episode is worth the wait
        if not last and time.monotonic() >= self._due and not (patient and self._writer.busy):
            self._save(self._settings.on_error)

    @property
    def position(self) -> dict[str, Any]:
        """Where sources stood when the checkpoint was taken."""
        return self._position["now"]

    @property
    def cut(self) -> bool:
        """Whether a process may have gone on after the checkpoint: the one that took it, or another
        that began with it, or with a later one."""
        try:
            begun = int((self._writer.directory / GOING_ON).read_text())
        except (OSError, ValueError):
            begun = -1
        return begun >= self._step or not self._position.get("last", False)

    def go_on(self) -> None:
        """Leave word that this process goes on after the checkpoint."""
        publish(self._writer.directory / GOING_ON, lambda path: path.write_text(f"{self._step}"))

    @property
    def _step(self) -> int:
        assert self.found is not None
        return self.found.manifest.step

    @property
    def _position(self) -> dict[str, Any]:
        assert self.found is not None
        return self.found.manifest.position

    def finish(self) -> None:
        """Save the last state, and wait for it.

        Raises:
            CheckpointError: it cannot be.
        """
        self._save(on_error="warn")  # this is of an earlier one, and the next line of this one
        self._writer.wait()

    def rescue(self) -> None:
        """`finish`, or the state before if the last one could not be computed.

        Raises:
            CheckpointError: neither can be saved.
        """
        try:
            self.finish()
        except CheckpointError:
            if self._earlier is None:
                raise
            self._latest, self._earlier = self._earlier, None
            self.finish()

    def _save(self, on_error: str) -> None:
        """Begin to save the latest state, and hear of the save before it.

        Raises:
            CheckpointError: that one has failed, and `on_error` is "raise". This one is on.
        """
        if self._latest is None:
            return
        (state, position), self._latest = self._latest, None
        self._due = time.monotonic() + self._settings.seconds
        try:
            self._writer.save(state, about=self._about, position=position)
            self._told = False
        except CheckpointError as error:
            if on_error == "raise":
                raise
            if not self._told:
                complain(f"{error} The run goes on, and tries again.", strict=False)
            self._told = True


@contextmanager
def saving(settings: Checkpoints | None, signals: Signals, data: Data) -> Iterator[Saver | None]:
    """A saver for a run; None without settings. An error within costs no finished episode; after a
    second signal nothing is saved."""
    if settings is None:
        yield None
        return
    with writing(settings.directory, keep=settings.keep, takeover=settings.takeover) as writer:
        saver = Saver(settings, writer, data)
        try:
            yield saver
        except BaseException as error:
            if not signals.twice:
                _try(saver.rescue, error)
            raise


def _try(rescue: Callable[[], None], error: BaseException) -> None:
    try:
        rescue()
    except Exception as failure:  # the first error is what the user has to see
        error.add_note(f"gradhpo: {failure}")
