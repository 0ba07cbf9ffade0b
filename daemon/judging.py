"""The engine thread: owns the device and judges frames in their order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict

import structlog

from daemon.channels import Channel, Closed, Grabbed, Probe, Swap
from daemon.events import EventKind, Events
from daemon.ledger import Entry, JudgedBy, Ledger
from daemon.ring import FrameRing, Slot
from daemon.supervision import Call
from drivers.frame import Image
from pipeline.inspect import Begun, Inspector
from pipeline.inspection import Inspection, Outcome, Reason

_ENGINE_ERRORS_IN_A_ROW = 3
"""So many make the engine be built anew: a device that has lost its context fails for ever."""

Tap = Callable[[Entry, Image, Inspection | None], None]
"""Looks at a judged frame and copies what it wants to keep; None: it came too late to be judged."""


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
        self._begun: deque[tuple[Grabbed, Begun, int]] = deque()
        """What the engine has begun with, and when it did."""
        self.in_hand: tuple[Grabbed, ...] = ()
        """What was taken and has not been judged yet."""
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
        while True:
            if self._begun and (len(self._begun) >= inspector.engine.at_once or self._frames.is_empty):
                self._finish(inspector)
                continue
            item = self._frames.get()
            if isinstance(item, Grabbed):
                self._begin(inspector, item)
                continue
            while self._begun:  # what was put in first comes out first, and by the inspector of then
                self._finish(inspector)
            if isinstance(item, Probe):
                self._pass_probe(item.number)
            elif item.done.set_running_or_notify_cancel():
                inspector = item.inspector
                self._now_judging(inspector)
                item.done.set_result(None)

    def held_slots(self) -> list[Slot]:
        """Return the slots that this generation holds."""
        previous, in_hand = self._previous, self.in_hand  # its thread may come back at this very moment
        return ([] if previous is None else [previous]) + [item.slot for item in in_hand]

    def _now_judging(self, inspector: Inspector) -> None:
        bundle, engine = inspector.bundle, inspector.engine
        roi = bundle.model.preprocess.roi
        geometry = {**bundle.model.geometry.to_json(), "roi": None if roi is None else asdict(roi)}
        self._judged_by = JudgedBy(
            bundle.model_id, bundle.calibration_id, inspector.threshold, engine.device, engine.precision, geometry
        )
        self._ledger.judged_by = self._judged_by

    def _begin(self, inspector: Inspector, item: Grabbed) -> None:
        self.in_hand = (*self.in_hand, item)
        began_ns = time.monotonic_ns()
        # One slow frame must not make all that follow late.
        if item.entry.is_late():
            self._forget(item, None)
            self.in_hand = self.in_hand[:-1]
            self._ring.give_back(item.slot)  # nobody looked at it, so nobody compares with it
            return
        with self.call.running():
            begun = inspector.begin(item.entry.frame)
        if self.abandoned:
            raise Closed
        self._begun.append((item, begun, began_ns))

    def _finish(self, inspector: Inspector) -> None:
        item, begun, began_ns = self._begun.popleft()
        entry = item.entry
        with self.call.running():
            inspection = inspector.finish(begun)
        self.worked = not self.abandoned
        if not self._ledger.settle(entry, inspection, judged_by=self._judged_by, began_ns=began_ns):
            self._too_late(entry, inspection)
        self._forget(item, inspection)
        self.in_hand = self.in_hand[1:]
        # One frame later than its verdict: the check for frozen frames still compares with this one.
        previous, self._previous = self._previous, item.slot
        if previous is not None:
            self._ring.give_back(previous)
        self._look_at(entry, inspection)

    def _forget(self, item: Grabbed, inspection: Inspection | None) -> None:
        frame = item.entry.frame
        if frame.image is None:
            raise AssertionError("frames without an image are settled by acquisition")
        self._tap(item.entry, frame.image, inspection)
        frame.forget_image()
        if self.abandoned:
            raise Closed

    def _look_at(self, entry: Entry, inspection: Inspection) -> None:
        if inspection.outcome is Outcome.INVALID:
            self._log.warning(
                "invalid",
                sequence=entry.sequence,
                reason=inspection.reason,
                detail=inspection.detail,
                source=entry.frame.source,
                exc_info=inspection.error,
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
