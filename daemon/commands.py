"""What clients of the control and replay sockets may have done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Protocol, assert_never

import msgspec

from daemon.acquisition import Line
from daemon.archive import Archive, Taken
from daemon.events import EventKind, Events
from daemon.journal import Journal, NoJournal, Query, read_journal
from daemon.ledger import Entry, Ticket
from daemon.messages import HealthMessage
from daemon.publishing import Publishing
from daemon.reload import ReloadRefused
from daemon.replies import Capture, Command, Pause, Reload, Resume, Snapshot, Status, Stop, Trigger
from daemon.serving import Answer, Refused
from daemon.tally import Tally
from drivers.camera import Fires
from drivers.frame import Frame, FrameStatus


class Controlled(Protocol):
    """What a station lets its commands do."""

    tally: Tally
    events: Events

    def health_message(self) -> HealthMessage:
        """Describe the station now."""
        ...

    def fires(self) -> Fires:
        """Tell who triggers the camera."""
        ...

    def reload(self) -> dict[str, str]:
        """Take a new configuration. Raises ReloadRefused."""
        ...

    def stop(self) -> None:
        """End as SIGTERM does."""
        ...


class Commands:
    """Carry out what the server thread was asked for."""

    def __init__(
        self, station: Controlled, line: Line, archive: Archive, publishing: Publishing, journal: Journal | None
    ) -> None:
        self._station = station
        self._line = line
        self._archive = archive
        self._publishing = publishing
        self._journal = journal
        self._ticket = Ticket()
        self._beginning: Future[Answer] | None = None
        """The latest capture, until it has begun."""

    def carry_out(self, command: Command) -> Answer | Future[Answer]:
        """Do what a command says, at once or later. Raises Refused."""
        match command:
            case Status():
                status = msgspec.to_builtins(self._station.health_message())
                return Answer({**status, "capture": self._archive.capture_progress})
            case Trigger():
                return self._trigger(command)
            case Pause():
                self._line.paused.set()
                self._say("paused")
                return Answer({"state": "paused"})
            case Resume():
                self._line.paused.clear()
                self._say("resumed")
                return Answer({"state": "running"})
            case Reload():
                return _in_a_thread(self._reload)
            case Snapshot():
                return self._snapshot(command)
            case Capture():
                # It makes a folder, on a disk that may hang: one at a time, or who asks again adds threads.
                if self._beginning is not None and not self._beginning.done():
                    raise Refused("another capture is being begun")
                self._beginning = _in_a_thread(lambda: self._capture(command))
                return self._beginning
            case Stop():
                self._say("stopped")
                self._station.stop()
                return Answer({"state": "draining"})
            case _:
                assert_never(command)

    def last_published(self) -> int:
        """Return the last number that was published; 0 before the first."""
        return self._station.tally.totals().last_sequence

    def verdicts(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yield what journal and memory hold of a range, in order. Raises JournalError."""
        found = dict(self._publishing.recent(first, last))
        # Memory first: a journal that cannot be read must not keep what is there from those who ask.
        if self._journal is not None and len(found) < last - first + 1:
            query = Query(first_sequence=first, last_sequence=last)
            with contextlib.suppress(NoJournal):  # nothing was written yet
                found = {**dict(read_journal(self._journal.path, query)), **found}
        yield from sorted(found.items())

    def _trigger(self, command: Trigger) -> Answer:
        if self._station.fires() is not Fires.ON_COMMAND:
            raise Refused("this camera is not triggered by command; set camera.trigger: command")
        if self._line.paused.is_set() or self._line.stop.is_set():
            raise Refused("the line is paused or stopping")
        if self._line.ledger.is_full:
            raise Refused("too many verdicts wait to be published")

        def number() -> Entry:
            fired = Frame(FrameStatus.PENDING, self._line.state.source or "")
            return self._line.ledger.open(self._ticket, fired, trigger=command.id, part=command.part)

        if not self._line.triggers.ask(number):
            raise Refused("too many triggers wait for the camera, or the line is starting or stopping")
        return Answer({"trigger": command.id, "part": command.part})

    def _reload(self) -> Answer:
        try:
            return Answer(dict(self._station.reload()))
        except ReloadRefused as error:
            raise Refused(str(error)) from error

    def _snapshot(self, command: Snapshot) -> Future[Answer]:
        answer: Future[Answer] = Future()

        def taken(snapshot: Future[Taken]) -> None:
            if snapshot.cancelled():
                answer.cancel()
            elif answer.set_running_or_notify_cancel():  # else nobody waits for it any more
                error = snapshot.exception()
                if error is not None:
                    answer.set_exception(error)
                else:
                    png, sequence, fmt = snapshot.result()
                    found = {"sequence": sequence, "bytes": len(png), "pixel_format": fmt.value}
                    answer.set_result(Answer(found, png))

        snapshot = self._archive.snapshot(overlay=command.overlay)
        snapshot.add_done_callback(taken)
        # Nobody waits for it any more: no part's image needs to be encoded for it.
        answer.add_done_callback(lambda answered: snapshot.cancel() if answered.cancelled() else None)
        return answer

    def _capture(self, command: Capture) -> Answer:
        replaced = self._archive.capture_progress
        if replaced is not None and replaced["taken"] == replaced["wanted"]:
            replaced = None
        try:
            folder = self._archive.capture(command.count, command.name)
        except FileExistsError as error:
            raise Refused(f"there is a capture {command.name!r} already; choose another name") from error
        except OSError as error:
            raise Refused(str(error)) from error
        return Answer({"folder": str(folder), "wanted": command.count, "replaced": replaced})

    def _say(self, what: str) -> None:
        self._station.events.say(EventKind.CONTROL, f"{what} by command", level="info")


def _in_a_thread(work: Any) -> Future[Answer]:
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - becomes the reply
            answer.set_exception(error)
        else:
            answer.set_result(result)

    answer.set_running_or_notify_cancel()
    threading.Thread(target=run, name="command", daemon=True).start()
    return answer
