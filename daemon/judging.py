"""The engine thread: owns the device and judges frames in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from daemon.channels import Channel, End, Grabbed, Judged, Probe
from daemon.messages import HealthMessage
from daemon.ring import FrameRing, Slot
from pipeline.inspect import Inspector, Outcome


class Judging:
    """Turn numbered frames into judged ones; every frame that comes in goes out, in the same order."""

    def __init__(
        self,
        make_inspector: Callable[[], Inspector],
        ring: FrameRing,
        frames: Channel[Grabbed | Probe | End],
        out: Channel[Judged | HealthMessage | Probe | End],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._make_inspector = make_inspector
        self._ring = ring
        self._frames = frames
        self._out = out
        self._log = log
        self.ready: Future[Inspector] = Future()
        """Done when the engine can judge; holds the exception when it could not be made."""

    def run(self) -> None:
        """Make the engine, then judge until End."""
        try:
            inspector = self._make_inspector()
        except BaseException as error:
            self.ready.set_exception(error)
            raise
        self.ready.set_result(inspector)
        previous: Slot | None = None
        while True:
            item = self._frames.get()
            if isinstance(item, Grabbed):
                previous = self._judge(inspector, item, previous)
                continue
            self._out.put(item)
            if isinstance(item, End):
                return

    def _judge(self, inspector: Inspector, item: Grabbed, previous: Slot | None) -> Slot | None:
        began_ns = time.monotonic_ns()
        inspection = inspector.inspect(item.frame)
        self._out.put(Judged(item.frame, inspection, began_ns))
        if inspection.outcome is Outcome.INVALID:
            self._log.warning(
                "invalid",
                sequence=item.frame.sequence,
                reason=inspection.reason,
                detail=inspection.detail,
                source=item.frame.source,
                exc_info=inspection.error,
            )
        if item.slot is None:
            return previous
        # One frame later than its verdict: the check for frozen frames still compares with this one.
        if previous is not None:
            self._ring.give_back(previous)
        return item.slot
