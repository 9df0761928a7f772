"""A run that saves its states, and goes on from them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradhpo.checkpoint.errors import CheckpointError, CheckpointMismatch
from gradhpo.checkpoint.manifest import as_json
from gradhpo.checkpoint.reader import check_about, compare_environments
from gradhpo.checkpoint.settings import Checkpoints
from gradhpo.checkpoint.writer import Writer, writing
from gradhpo.core.state import BilevelState
from gradhpo.driver.data import Data
from gradhpo.driver.interruption import Signals
from gradhpo.utils.validation import complain

__all__ = ["Saver", "saving"]


class Saver:
    """Saves the states of one run.

    Attributes:
        found: The checkpoint to go on from; None: the run begins.
    """

    def __init__(self, settings: Checkpoints, writer: Writer):
        self._settings, self._writer = settings, writer
        self.found = writer.newest()
        self._about: dict[str, Any] = {}
        self._origin: dict[str, Any] = {}
        self._latest: tuple[BilevelState, dict[str, Any]] | None = None  # not begun to be saved
        self._earlier = self._latest
        self._due = time.monotonic() + settings.seconds
        self._told = False

    def origin(self, data: Data) -> dict[str, Any]:
        """Where sources of data stood when this run began, be it in another process.

        Raises:
            CheckpointMismatch: the checkpoint is none of a run.
        """
        if self.found is not None:
            if "origin" not in self.found.manifest.position:
                raise CheckpointMismatch(
                    f"{self.found.path} was saved by a loop of its own, and not by `run`: take "
                    "another directory, or restore it and give it to `run` as the state."
                )
            self._origin = self.found.manifest.position["origin"]
        else:
            self._origin = data.positions()
        return self._origin

    def begin(
        self, about: dict[str, Any], template: BilevelState, episodes: int
    ) -> BilevelState | None:
        """The state to go on from, now that the run knows itself; None: it begins.

        Args:
            about: What it is, by name.
            template: A state of its final structure, before the first episode.
            episodes: After how many it ends, counted from `init`.

        Raises:
            CheckpointMismatch: the checkpoint is of another run, or lies beyond the end of this.
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
        state = self.found.restore(template)
        if int(state.episode) > episodes:
            raise CheckpointMismatch(
                f"{self.found.path} is the state after episode {int(state.episode)}, and this run "
                f"ends after episode {episodes}: ask for more episodes, or take another directory."
            )
        return state

    def after(self, state: BilevelState, data: Data) -> None:
        """An episode has ended; its computation may still run."""
        self._earlier = self._latest  # computed, since the run has waited for it
        self._latest = state, {"origin": self._origin, "now": data.positions()}
        patient = self._settings.seconds > 0  # else every episode is worth the wait
        if time.monotonic() >= self._due and not (patient and self._writer.busy):
            try:
                self._save()
            except CheckpointError as error:
                if self._settings.on_error == "raise":
                    raise
                if not self._told:
                    complain(f"{error} The run goes on, and tries again.", strict=False)
                self._told = True

    @property
    def position(self) -> dict[str, Any]:
        """Where sources stood when the checkpoint was taken."""
        return {} if self.found is None else self.found.manifest.position["now"]

    def finish(self) -> None:
        """Save the last state, and wait for it.

        Raises:
            CheckpointError: it cannot be.
        """
        self._save()
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

    def _save(self) -> None:
        """Raises the error of the save before this one, if it has failed; this one is on anyway."""
        if self._latest is None:
            return
        (state, position), self._latest = self._latest, None
        self._due = time.monotonic() + self._settings.seconds
        self._writer.save(state, about=self._about, position=position)


@contextmanager
def saving(settings: Checkpoints | None, signals: Signals) -> Iterator[Saver | None]:
    """A saver for a run; None without settings. An error within costs no finished episode; after a
    second signal nothing is saved."""
    if settings is None:
        yield None
        return
    with writing(settings.directory, keep=settings.keep, takeover=settings.takeover) as writer:
        saver = Saver(settings, writer)
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
