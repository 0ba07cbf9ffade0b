"""The engine thread: owns the device and judges frames in their order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import NamedTuple

import structlog

from daemon.channels import Channel, Closed, Grabbed, Probe, Swap
from daemon.events import EventKind, Events
from daemon.ledger import Entry, JudgedBy, Ledger
from daemon.ring import FrameRing, Slot
from daemon.supervision import Call
from drivers.frame import Image
from pipeline.inspect import Inspector
from pipeline.inspection import Inspection, Outcome, Reason

_ENGINE_ERRORS_IN_A_ROW = 3
"""So many make the engine be built anew: a device that has lost its context fails for ever."""

_MEASURED = 8

Tap = Callable[[Entry, Image, Inspection | None], None]
"""Looks at a judged frame and copies what it wants to keep; None: it came too late to be judged."""


class _Begun(NamedTuple):
    """A frame that the engine has begun with."""

    item: Grabbed
    finish: Callable[[], Inspection]
    began_ns: int


class EngineFailing(Exception):
    """The engine has failed several times in a row and must be built anew."""


class Judging:
    """Judge numbered frames. One object for each generation of the thread."""

    def __init__(
        self,
        make_inspector: Callable[[], Inspector],
        ring: FrameRing,
        frames: Channel[Grabbed | Probe | Swap],
        ledger: Ledger,
        *,
        pass_probe: Callable[[int], None],
        tap: Tap,
        events: Events,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._make_inspector = make_inspector
        self._ring = ring
        self._frames = frames
        self._ledger = ledger
        self._pass_probe = pass_probe
        self._tap = tap
        self._events = events
        self._log = log
        self._previous: Slot | None = None
        self._errors_in_a_row = 0
        self._begun: deque[_Begun] = deque()
        """What the engine has begun with."""
        self._in_hand: list[Grabbed] = []
        """What was taken and has not been judged yet."""
        self._holding = threading.Lock()
        """For what is in hand, and the slots with it: a thread may come back while it is abandoned."""
        self._took_ns: deque[int] = deque(maxlen=_MEASURED)
        """How long the engine was busy with the latest frames; one is forgotten for each that is refused for it."""
        self._finished_ns = 0
        self.call = Call()
        """Runs while the thread is inside the engine."""
        self.building = Call()
        """Runs while the engine is made."""
        self.worked = False
        """A frame was judged."""
        self.abandoned = False
        """The supervisor has replaced this generation, and its slots."""
        self.ready: Future[None] = Future()
        """Done when the engine can judge; holds the exception when it could not be made."""

    def run(self) -> None:
        """Make the engine, then judge until the channel is closed."""
        try:
            with self.building.running():
                inspector = self._make_inspector()
            self._now_judging(inspector)
        except BaseException as error:
            self.ready.set_exception(error)
            raise
        self.ready.set_result(None)
        while not self.abandoned:
            if self._begun and not self._takes_another(inspector):
                self._finish()
                continue
            item = self._frames.get()
            if isinstance(item, Grabbed):
                self._begin(inspector, item)
            elif isinstance(item, Probe):
                self._pass_probe(item.number)
            elif item.done.set_running_or_notify_cancel():
                inspector = item.inspector
                self._now_judging(inspector)
                item.done.set_result(None)

    def _takes_another(self, inspector: Inspector) -> bool:
        """Tell whether the next frame is begun before the oldest on its way is finished.

        What is no frame stays in the channel until all are. A frame that might be late behind the others is looked
        at again after them: by then it may have to be refused. One of another kind than the last may take long to
        be prepared for the first time, while the others' time runs.
        """
        if len(self._begun) >= inspector.engine.at_once:
            return False
        item = self._frames.peek()
        if not isinstance(item, Grabbed) or _kind(item) != _kind(self._begun[-1].item):
            return False
        entries = (item.entry, *(begun.item.entry for begun in self._begun))
        needed_ns = len(entries) * self._needed_ns()
        return not any(entry.is_late(needed_ns) for entry in entries)

    def _needed_ns(self) -> int:
        """Return how long the engine was busy with a frame at least, lately."""
        return min(self._took_ns, default=0)

    def abandon(self) -> tuple[list[Grabbed], list[Slot]]:
        """End this generation, which may hang; return what it has not judged, and the slots that it holds."""
        with self._holding:
            self.abandoned = True
            previous = [] if self._previous is None else [self._previous]
            return list(self._in_hand), previous + [item.slot for item in self._in_hand]

    def _now_judging(self, inspector: Inspector) -> None:
        bundle, engine = inspector.bundle, inspector.engine
        roi = bundle.model.preprocess.roi
        geometry = {**bundle.model.geometry.to_json(), "roi": None if roi is None else asdict(roi)}
        self._judged_by = JudgedBy(
            bundle.model_id, bundle.calibration_id, inspector.threshold, engine.device, engine.precision, geometry
        )
        self._ledger.judged_by = self._judged_by

    def _begin(self, inspector: Inspector, item: Grabbed) -> None:
        with self._holding:
            abandoned = self.abandoned
            if not abandoned:
                self._in_hand.append(item)
        if abandoned:  # at the moment in which it was taken, so that nobody else knows of it
            lost = Inspection(Outcome.INVALID, Reason.ENGINE, "the engine was abandoned when it took this frame")
            self._ledger.settle(item.entry, lost)
            item.entry.frame.forget_image()
            self._ring.give_back(item.slot)
            raise Closed
        began_ns = time.monotonic_ns()
        # One slow frame must not make all that follow late, nor one that will be late the next.
        if item.entry.is_late(self._needed_ns()):
            if self._took_ns:  # a machine that was slow for a while is tried again
                self._took_ns.popleft()
            self._forget(item, None)
            self._let_go(item, compared=False)
            return
        with self.call.running():
            finish = inspector.begin(item.entry.frame)
        self._begun.append(_Begun(item, finish, began_ns))

    def _finish(self) -> None:
        item, finish, began_ns = self._begun.popleft()
        entry = item.entry
        with self.call.running():
            inspection = finish()
        self.worked = not self.abandoned
        now_ns = time.monotonic_ns()
        self._took_ns.append(now_ns - max(began_ns, self._finished_ns))
        self._finished_ns = now_ns
        if not self._ledger.settle(entry, inspection, judged_by=self._judged_by, began_ns=began_ns):
            self._too_late(entry, inspection)
        self._forget(item, inspection)
        self._let_go(item, compared=True)
        self._look_at(entry, inspection)

    def _forget(self, item: Grabbed, inspection: Inspection | None) -> None:
        frame = item.entry.frame
        if frame.image is None:
            raise AssertionError("frames without an image are settled by acquisition")
        self._tap(item.entry, frame.image, inspection)
        frame.forget_image()

    def _let_go(self, item: Grabbed, *, compared: bool) -> None:
        """Be done with a frame, and give a slot back; an abandoned generation has none any more. Raises Closed.

        That of a frame which the check for frozen ones still compares with is given back after the next.
        """
        slot: Slot | None = item.slot
        with self._holding:
            if self.abandoned:
                raise Closed
            self._in_hand.remove(item)
            if compared:
                slot, self._previous = self._previous, item.slot
        if slot is not None:
            self._ring.give_back(slot)

    def _look_at(self, entry: Entry, inspection: Inspection) -> None:
        if inspection.outcome is Outcome.INVALID:
            trace = {} if inspection.error is None else {"exception": "".join(inspection.error.format()).rstrip()}
            self._log.warning(
                "invalid",
                sequence=entry.sequence,
                reason=inspection.reason,
                detail=inspection.detail,
                source=entry.frame.source,
                **trace,
            )
        failed = inspection.reason is Reason.ENGINE and inspection.error is not None
        self._errors_in_a_row = self._errors_in_a_row + 1 if failed else 0
        if self._errors_in_a_row >= _ENGINE_ERRORS_IN_A_ROW:
            raise EngineFailing(f"{self._errors_in_a_row} frames in a row: {inspection.detail}")

    def _too_late(self, entry: Entry, inspection: Inspection) -> None:
        self._events.say(
            EventKind.LATE,
            "a result came after its verdict was due",
            sequence=entry.sequence,
            verdict=inspection.outcome.value,
            score=inspection.score,
            threshold=self._judged_by.threshold,
            infer_ms=round(inspection.infer_ns / 1e6, 3),
        )


def _kind(item: Grabbed) -> object:
    frame = item.entry.frame
    return frame.pixel_format, None if frame.image is None else frame.image.shape
