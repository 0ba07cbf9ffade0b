"""The ledger of open numbers: the one place that makes each verdict single, ordered and on time."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from daemon.sequence import SequenceFile
from daemon.tally import Tally, Totals
from drivers.frame import Frame, FrameStatus
from pipeline.inspection import Inspection, Outcome, Reason

_CAPACITY = 4096
"""Numbers without a verdict; beyond that acquisition waits."""
_MARGIN_SHARE, _LARGEST_MARGIN_NS = 0.1, 5_000_000


def margin_before_ns(deadline_ns: int) -> int:
    """Return how long before its deadline a verdict goes out, so that it is there in time."""
    return min(int(_MARGIN_SHARE * deadline_ns), _LARGEST_MARGIN_NS)


class Revoked(Exception):
    """This generation of acquisition was abandoned: it may number nothing any more."""


@dataclass(eq=False, slots=True)
class Ticket:
    """The right of one generation of acquisition to number frames."""

    revoked: bool = False


@dataclass(frozen=True, slots=True)
class JudgedBy:
    """Which model, calibration, threshold and engine made a verdict."""

    model: str
    calibration: str
    threshold: float
    device: str | None
    precision: str
    geometry: dict[str, Any]
    """As map messages carry it."""


@dataclass(eq=False, slots=True)
class Entry:
    """One number and what became of it."""

    frame: Frame
    due_ns: int | None
    """Host monotonic clock when its verdict must go out; None: it may take its time."""
    margin_ns: int
    """From then to its deadline."""
    judged_by: JudgedBy
    inspection: Inspection | None = None
    judging_began_ns: int = 0
    """Host monotonic clock; 0 where the engine never saw it."""
    trigger: str | None = None
    """Id of the trigger that somebody asked for."""
    part: str | None = None
    """Id of the part, as whoever triggered named it."""
    taken: bool = False
    """The publisher has it: whatever is found from now on is late."""
    body: bytes | None = None
    """The verdict as it was journaled and sent."""
    sent: bool = False
    draft: object = None
    """What the publisher has written down of it, for a successor."""

    @property
    def sequence(self) -> int:
        """The station's number."""
        return self.frame.sequence

    def is_late(self, after_ns: int = 0) -> bool:
        """Tell whether nothing found from now on, or after so long, can become this number's verdict."""
        return self.taken or (self.due_ns is not None and time.monotonic_ns() + after_ns >= self.due_ns)


class Ledger:
    """Numbers in their order, from grab to publication.

    Acquisition opens an entry for each frame or trigger, anyone settles it once, and the publisher takes the
    oldest when it is settled or due. Every method may be called from any thread.
    """

    def __init__(self, sequences: SequenceFile, tally: Tally, deadline_ms: Callable[[], float | None]) -> None:
        """Begin with nothing open.

        Args:
            sequences: gives out the numbers.
            tally: counts what is seen and what is published, in step with this ledger.
            deadline_ms: from trigger or grab to verdict; None: none. Asked for every frame.
        """
        self._sequences = sequences
        self._tally = tally
        self._deadline_ms = deadline_ms
        self._open: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._publisher_wakes_ns = 0
        """Until when the publisher sleeps if nobody wakes it."""
        self.judged_by = JudgedBy("", "", 0.0, None, "", {})
        """What judges now; entries that no engine saw carry it too."""

    def open(self, ticket: Ticket, frame: Frame, *, trigger: str | None = None, part: str | None = None) -> Entry:
        """Give a frame or a trigger its number and its deadline. Waits while full; raises Revoked."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._open) < _CAPACITY or ticket.revoked)
            if ticket.revoked:
                raise Revoked
            frame.sequence = self._sequences.next()
            entry = self._append(frame)
            entry.trigger, entry.part = trigger, part
            if entry.due_ns is not None and entry.due_ns < self._publisher_wakes_ns:
                self._wake_publisher(entry)
            return entry

    def fill(self, entry: Entry, frame: Frame) -> bool:
        """Give a trigger's entry its frame. Returns False when it comes too late to be judged."""
        with self._changed:
            if entry.taken or entry.inspection is not None:
                return False
            entry.frame = frame
            return True

    def restore(self, sequence: int) -> None:
        """Open and settle a number that an earlier run left without a verdict."""
        with self._changed:
            entry = self._append(Frame(FrameStatus.LOST, source="", sequence=sequence))
            entry.inspection = Inspection(Outcome.INVALID, Reason.RESTART, "numbered by an earlier run")
            self._changed.notify_all()

    def settle(
        self,
        entry: Entry,
        inspection: Inspection,
        *,
        judged_by: JudgedBy | None = None,
        began_ns: int = 0,
    ) -> bool:
        """Write down what was found. Returns False when it comes too late to be the verdict."""
        with self._changed:
            if entry.taken or entry.inspection is not None:
                return False
            entry.inspection, entry.judging_began_ns = inspection, began_ns
            entry.judged_by = judged_by or entry.judged_by
            self._wake_publisher(entry)
            return True

    def take(self, timeout_s: float, at_once: int) -> list[Entry]:
        """Return the oldest entry once it is settled or due, and those after it that are settled already.

        Entries are returned until `done` was called for them, so that a publisher's successor goes on where it
        stopped.

        Args:
            timeout_s: after which nothing is returned.
            at_once: how many at most.
        """
        until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        with self._changed:
            while True:
                now_ns = time.monotonic_ns()
                wake_ns = until_ns
                if self._open:
                    entry = self._open[0]
                    if entry.inspection is None and entry.due_ns is not None:
                        wake_ns = min(wake_ns, entry.due_ns)
                        if now_ns >= entry.due_ns:
                            entry.inspection = Inspection(Outcome.INVALID, Reason.DEADLINE, "no result in time")
                            at_once = 1  # it does not wait for those behind it
                    settled = itertools.takewhile(lambda one: one.inspection is not None, self._open)
                    found = list(itertools.islice(settled, at_once))
                    for one in found:
                        one.taken = True
                    if found:
                        return found
                if now_ns >= until_ns or (self._ended and not self._open):
                    return []
                self._publisher_wakes_ns = wake_ns
                self._changed.wait((wake_ns - now_ns) / 1e9)

    def done(self, entry: Entry, latency_us: tuple[int, ...] | None) -> None:
        """Remove the oldest entry, whose verdict was sent, and count it."""
        inspection = entry.inspection
        if inspection is None or not self._open or self._open[0] is not entry:
            raise AssertionError("only the oldest entry, settled, can be done")
        with self._changed:
            self._sequences.mark_published(entry.sequence)
            self._open.popleft()
            self._tally.published(entry.sequence, inspection.outcome, inspection.reason, latency_us)
            self._changed.notify_all()

    def wait_sent(self, entry: Entry, timeout_s: float) -> bool:
        """Wait until an entry's verdict was published; False when it was not within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: entry.sent, timeout_s)

    def end(self) -> None:
        """Say that nothing will be opened any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def give_up(self, reason: Reason, detail: str) -> None:
        """End, with one reason for everything that has no result: nobody will find one any more."""
        with self._changed:
            self._ended = True
            for entry in self._open:
                entry.inspection = entry.inspection or Inspection(Outcome.INVALID, reason, detail)
            self._changed.notify_all()

    @property
    def is_full(self) -> bool:
        """Tell whether `open` would wait: the publisher does not keep up, or is not there."""
        with self._changed:
            return len(self._open) >= _CAPACITY

    @property
    def over(self) -> bool:
        """Tell whether everything has its verdict and nothing more will come."""
        with self._changed:
            return self._ended and not self._open

    def revoke(self, ticket: Ticket) -> None:
        """Take an abandoned generation's right to number away."""
        with self._changed:
            ticket.revoked = True
            self._changed.notify_all()

    def audit(self) -> tuple[Totals, int]:
        """Return the counts and, taken at the same moment, how many numbers are open."""
        with self._changed:
            return self._tally.totals(), len(self._open)

    def _wake_publisher(self, entry: Entry) -> None:
        """Wake it for the oldest entry only: each needless switch between threads costs time."""
        if self._open[0] is entry:
            self._changed.notify_all()

    def _append(self, frame: Frame) -> Entry:
        deadline_ms, due_ns, margin_ns = self._deadline_ms(), None, 0
        if deadline_ms is not None:
            deadline_ns = int(deadline_ms * 1e6)
            margin_ns = margin_before_ns(deadline_ns)
            due_ns = frame.arrived_ns + deadline_ns - margin_ns
        entry = Entry(frame, due_ns, margin_ns, self.judged_by)
        self._open.append(entry)
        self._tally.saw()
        return entry
