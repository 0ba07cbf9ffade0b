"""The publisher thread: owns the PUB sockets and sends each verdict exactly once, in order and in time."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
import zmq

from daemon.events import EventKind, Events, Outbox
from daemon.journal import MOST_UNWRITTEN, Journal, Record
from daemon.keys import Right, Security
from daemon.ledger import Entry, Ledger
from daemon.messages import (
    MAP_SCHEMA,
    VERDICT_SCHEMA,
    LatencyMessage,
    MapMessage,
    VerdictMessage,
    encode,
    frame_message,
    map_bytes,
    region_messages,
    rfc3339,
)
from daemon.sockets import Bound, Context, Socket, bound
from daemon.tally import Tally
from pipeline.inspection import Inspection, Outcome, Reason

_VERDICT_HIGH_WATER_MARK = 20_000
"""Messages kept for a subscriber that reads too slowly, before it loses the newest."""
_MAP_HIGH_WATER_MARK = 4
_RECENT = MOST_UNWRITTEN
"""Verdicts kept in memory, for replay where the journal could not take them, or has not yet."""
_FAIR_WAIT_NS = 1_000_000
"""A journal that was given less time than this is not called slow."""
_AT_ONCE = 32
"""Verdicts that are handed to the journal together, when so many wait."""
_LOOK_UP_S = 0.05
"""How often events and health are sent while no verdict is due."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A verdict that is written down."""

    inspection: Inspection
    latency: LatencyMessage
    record: Record | None
    """What the journal was given; None where there is none."""


class Publishing:
    """Send what the ledger holds; PUB sockets never make the sender wait."""

    def __init__(
        self,
        station: str,
        boot: str,
        endpoints: tuple[Sequence[str], Sequence[str]],
        *,
        context: Context,
        security: Security,
        ledger: Ledger,
        journal: Journal | None,
        tally: Tally,
        outbox: Outbox,
        events: Events,
        journal_wait_ms: float,
        alarm_after: Callable[[], int | None],
        passed: Callable[[int, int | None], None] | None,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        """Prepare; sockets are bound by `run`.

        Args:
            station: name in topics and messages.
            boot: id of this start.
            endpoints: of verdicts, events and health; of maps.
            context: shared with the thread that authenticates clients.
            security: keys that sockets ask for.
            ledger: what is to be published.
            journal: gets every verdict first; None: no journal.
            tally: learns how long commits took.
            outbox: messages other than verdicts.
            events: told of alarms and unjournaled verdicts.
            journal_wait_ms: how long a verdict waits for its commit, if its deadline allows.
            alarm_after: rejects in a row that raise an alarm; None: never.
            passed: told of each OK once it is sent, and when its deadline ends; None: nobody wants to know.
            log: for each verdict at level debug.
        """
        self._station, self._boot = station, boot
        self._verdict_topic = self._topic("verdict")
        verdicts, maps = endpoints
        self._wanted = (
            Bound("publish.verdicts", zmq.PUB, verdicts, Right.SUBSCRIBE, {zmq.SNDHWM: _VERDICT_HIGH_WATER_MARK}),
            Bound("publish.maps", zmq.PUB, maps, Right.SUBSCRIBE, {zmq.SNDHWM: _MAP_HIGH_WATER_MARK}),
        )
        self._sends_maps = bool(maps)
        self._context = context
        self._security = security
        self._ledger = ledger
        self._journal = journal
        self._tally = tally
        self._outbox = outbox
        self._events = events
        self._journal_wait_ns = int(journal_wait_ms * 1e6)
        self._alarm_after = alarm_after
        self._passed = passed
        self._log = log
        self._rebind = threading.Event()
        self._rejects_in_a_row = 0
        self._probe = 0
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=_RECENT)
        self._recent_lock = threading.Lock()
        self.ready: Future[None] = Future()
        """Done when every endpoint is bound; holds the exception when one could not be."""
        self.probe_seen = 0
        """Number of the last probe that came all the way through."""
        self.last_outcome: Outcome | None = None
        self.first_grab_ns: int | None = None
        self.last_sent_ns = 0

    def pass_probe(self, number: int) -> None:
        """Take a probe from the engine thread."""
        self._probe = number

    def recent(self, first: int, last: int) -> list[tuple[int, bytes]]:
        """Return the latest verdicts of a range, journaled or not."""
        with self._recent_lock:  # not for long: the publisher waits for it
            if not self._recent:
                return []
            oldest, _ = self._recent[0]  # numbers have no gaps
            return list(itertools.islice(self._recent, max(0, first - oldest), max(0, last + 1 - oldest)))

    def rebind(self) -> None:
        """Close every connection and let the clients come back, so that revoked keys end."""
        self._rebind.set()

    def run(self) -> None:
        """Bind, then publish until the ledger is over."""
        while not self._ledger.over:
            self._rebind.clear()
            with bound(self._context, self._security, self._wanted, self.ready) as (verdicts, maps):
                self._serve(verdicts, maps)

    def _serve(self, verdicts: Socket, maps: Socket) -> None:
        at_once = 1  # after a failure, nothing is journaled ahead of what may fail again
        while not (self._ledger.over or self._rebind.is_set()):
            entries = self._ledger.take(_LOOK_UP_S, at_once)
            submitted: list[tuple[Entry, Draft]] = []
            try:
                for entry in entries:
                    submitted.append((entry, self._submit(entry)))
            finally:  # one that cannot be written down must not hold back those before it
                for entry, draft in submitted:
                    self._publish(entry, draft, verdicts, maps)
            # Those that wait already are journaled together: a commit of many costs as much as one verdict's own.
            at_once = _AT_ONCE
            self._send_messages(verdicts)
            self.probe_seen = self._probe
        self._send_messages(verdicts)

    def _send_messages(self, verdicts: Socket) -> None:
        for topic, message in self._outbox.take():
            verdicts.send_multipart([self._topic(topic), encode(message)])

    def _publish(self, entry: Entry, draft: Draft, verdicts: Socket, maps: Socket) -> None:
        inspection, latency = draft.inspection, draft.latency
        if entry.body is None:
            entry.body = self._journaled(entry, draft)
        if not entry.sent:  # a predecessor of this thread may have failed after sending
            # As send_multipart does, which takes longer to look at its parts than these take to be sent.
            verdicts.send(self._verdict_topic, zmq.SNDMORE)
            verdicts.send(entry.body)
            with self._recent_lock:
                self._recent.append((entry.sequence, entry.body))
            entry.sent = True
            if self._passed is not None and inspection.outcome is Outcome.OK:
                self._passed(entry.sequence, None if entry.due_ns is None else entry.due_ns + entry.margin_ns)
        self.last_sent_ns = sent_ns = time.monotonic_ns()
        stages = None
        if inspection.outcome is not Outcome.INVALID:
            sent_after = _us(sent_ns - entry.frame.arrived_ns)
            stages = (latency.grab, latency.queue, latency.preprocess, latency.infer, sent_after)
        self._ledger.done(entry, stages)
        self.last_outcome = inspection.outcome
        if self.first_grab_ns is None and entry.frame.grabbed_ns:
            self.first_grab_ns = entry.frame.arrived_ns
        self._send_map(entry, inspection, maps)
        self._watch_for_alarm(entry, inspection)
        self._log.debug(
            "verdict", sequence=entry.sequence, verdict=inspection.outcome.value, score=inspection.score
        )

    def _submit(self, entry: Entry) -> Draft:
        """Write a verdict down and give it to the journal, unless this thread's predecessor has."""
        if isinstance(entry.draft, Draft):
            return entry.draft
        inspection = entry.inspection
        if inspection is None:
            raise AssertionError("the ledger hands out settled entries")
        latency = self._latency(entry, inspection)
        record = None
        if self._journal is not None:
            record = Record(
                entry.sequence,
                entry.frame.wall_ns,
                self._boot,
                inspection.outcome.value,
                None if inspection.reason is None else inspection.reason.value,
                inspection.score,
                encode(self._message(entry, inspection, latency, journaled=True)),
            )
        # Remembered before it is submitted: should this thread fail in between, its successor does not do it again.
        entry.draft = draft = Draft(inspection, latency, record)
        if self._journal is not None and record is not None:
            self._journal.submit(record)
        return draft

    def _journaled(self, entry: Entry, draft: Draft) -> bytes:
        """Return the message, handed to the operating system if that is possible in time."""
        journal, record, inspection, latency = self._journal, draft.record, draft.inspection, draft.latency
        if journal is None or record is None:
            return encode(self._message(entry, inspection, latency, journaled=False))
        wait_ns = self._journal_wait_ns
        if entry.due_ns is not None:
            wait_ns = min(wait_ns, entry.due_ns + entry.margin_ns // 2 - time.monotonic_ns())
        if record.wait(0.0 if journal.lagging else wait_ns / 1e9):
            self._tally.committed((time.monotonic_ns() - record.submitted_ns) // 1000)
            return record.body
        if wait_ns >= min(_FAIR_WAIT_NS, self._journal_wait_ns) > 0 and not journal.lagging:
            journal.lag()
        record.body = encode(self._message(entry, inspection, latency, journaled=False))
        return record.body

    def _message(
        self, entry: Entry, inspection: Inspection, latency: LatencyMessage, *, journaled: bool
    ) -> VerdictMessage:
        frame = entry.frame
        return VerdictMessage(
            schema=VERDICT_SCHEMA,
            station=self._station,
            boot=self._boot,
            sequence=entry.sequence,
            verdict=inspection.outcome.value,
            reason=None if inspection.reason is None else inspection.reason.value,
            score=inspection.score,
            threshold=entry.judged_by.threshold,
            regions=region_messages(inspection),
            source=frame.source,
            part=entry.part,
            trigger=entry.trigger,
            recipe=None,
            frame=frame_message(frame),
            model=entry.judged_by.model,
            calibration=entry.judged_by.calibration,
            time=rfc3339(frame.wall_ns),
            latency_us=latency,
            journaled=journaled,
        )

    def _latency(self, entry: Entry, inspection: Inspection) -> LatencyMessage:
        frame, began_ns = entry.frame, entry.judging_began_ns
        return LatencyMessage(
            grab=_us(frame.grabbed_ns - frame.arrived_ns) if frame.grabbed_ns else 0,
            queue=_us(began_ns - frame.grabbed_ns) if began_ns else 0,
            preprocess=_us(inspection.preprocess_ns),
            infer=_us(inspection.infer_ns),
            total=_us(time.monotonic_ns() - frame.arrived_ns),
        )

    def _send_map(self, entry: Entry, inspection: Inspection, maps: Socket) -> None:
        if inspection.anomaly_map is None or not self._sends_maps:
            return
        described = MapMessage(
            schema=MAP_SCHEMA,
            station=self._station,
            boot=self._boot,
            sequence=entry.sequence,
            dtype="<f4",
            shape=list(inspection.anomaly_map.shape),
            geometry=entry.judged_by.geometry,
            score=inspection.score,
            threshold=entry.judged_by.threshold,
        )
        maps.send_multipart([self._topic("map"), encode(described), map_bytes(inspection.anomaly_map)])

    def _watch_for_alarm(self, entry: Entry, inspection: Inspection) -> None:
        if inspection.reason is Reason.RESTART:  # says nothing about lamp and camera
            return
        self._rejects_in_a_row = 0 if inspection.outcome is Outcome.OK else self._rejects_in_a_row + 1
        limit = self._alarm_after()
        if limit is not None and self._rejects_in_a_row and self._rejects_in_a_row % limit == 0:
            self._events.say(
                EventKind.ALARM,
                f"{self._rejects_in_a_row} rejects in a row; look at the lamp and the camera",
                sequence=entry.sequence,
                rejects_in_a_row=self._rejects_in_a_row,
            )

    def _topic(self, kind: str) -> bytes:
        # Topics end with a slash, so that a filter for station1 does not match station10.
        return f"{kind}/{self._station}/".encode()


def _us(ns: int) -> int:
    return max(0, ns) // 1000
