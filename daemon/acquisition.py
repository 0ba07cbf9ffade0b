"""The acquisition thread: open the camera, number every frame and trigger, reopen when it is lost."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog

from daemon.channels import Channel, Closed, Grabbed, Probe, Swap
from daemon.events import EventKind, Events
from daemon.ledger import Entry, Ledger, Revoked, Ticket
from daemon.ring import FrameRing, Slot
from daemon.supervision import Backoff, Call
from drivers.camera import Camera, CameraError, CameraLost, EndOfStream, Fires
from drivers.frame import Frame, FrameStatus
from pipeline.inspection import Inspection, Outcome, Reason

GRAB_TIMEOUT_S = 0.1
_REOPENS_AFTER_HANG = 5
"""A camera that hung still holds its device; when reopening fails so often, only a new process helps."""
_WAITING_TRIGGERS = 64
_DELIVERED_AT_MOST = 16
"""Grabs before a camera is closed: more than a driver has buffers, and an end for one that never stops."""
_READY_WITHIN_S = 10.0
"""A camera for a trigger, from when somebody asked for it; its deadline may come first."""
_ASKED_FOR_S = 1.0
"""How long a camera is asked at least whether it is ready, for a trigger that waited behind others."""
_WAITS_WHILE_STOPPING_S = 2.0
"""For a slot: a slow engine must not keep the daemon from ending."""


@dataclass(frozen=True, slots=True)
class CameraState:
    """What is known of the camera, for health messages."""

    connected: bool = False
    source: str | None = None
    reopened: int = 0
    error: str | None = None


class Triggers:
    """Triggers that were asked for and numbered, and wait for the camera."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closed = True

    def open(self) -> None:
        """Take triggers from now on."""
        with self._changed:
            self._closed = False

    def ask(self, number: Callable[[], Entry]) -> bool:
        """Number a trigger and append it; False when too many wait already, or when none is taken now."""
        with self._changed:
            if self._closed or len(self._waiting) >= _WAITING_TRIGGERS:
                return False
            self._waiting.append(number())
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> Entry | None:
        """Take the oldest, waiting up to `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, timeout_s)
            return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self._closed = True


class Line:
    """What outlives a generation of acquisition: where frames go, and what the supervisor may ask for."""

    def __init__(self, ledger: Ledger, ring: FrameRing, frames: Channel[Grabbed | Probe | Swap]) -> None:
        self.ledger = ledger
        self.ring = ring
        self.frames = frames
        """The present generation's; replaced when the engine's thread is."""
        self.triggers = Triggers()
        self.stop = threading.Event()
        self.paused = threading.Event()
        self.probe_wanted = 0
        self.state = CameraState()

    def refuse_triggers(self, why: str) -> None:
        """Answer triggers that wait for a camera that is away: each has a part in front of it."""
        while (entry := self.triggers.take(0)) is not None:
            self.ledger.settle(entry, Inspection(Outcome.INVALID, Reason.CAMERA, why))

    def end(self, why: str) -> None:
        """Take nothing more."""
        self.triggers.close()
        self.refuse_triggers(why)
        self.ledger.end()

    def send(self, item: Grabbed | Probe | Swap) -> None:
        """Hand something to whichever generation of the engine's thread is there."""
        while True:
            channel = self.frames
            try:
                return channel.put(item)
            except Closed:
                if self.frames is channel:  # closed for good
                    raise


class Acquisition:
    """Turn a camera into a stream of numbered frames. One object for each generation of the thread."""

    def __init__(
        self,
        camera: Camera,
        line: Line,
        *,
        wait_when_full: Callable[[], bool],
        after_hang: bool,
        events: Events,
        next_camera: Callable[[], Camera | None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        """Prepare.

        Args:
            camera: opened by `run`, closed by it.
            line: shared with earlier and later generations.
            wait_when_full: wait for a slot instead of INVALID/overload.
            after_hang: the generation before this one was abandoned inside the driver.
            events: told of cameras lost and found.
            next_camera: asked at every turn for a camera to go on with; None: keep this one.
            log: for what happens.
        """
        self.camera = camera
        self._line = line
        self._wait_when_full = wait_when_full
        self.after_hang = after_hang
        self._events = events
        self._next_camera = next_camera
        self._log = log
        self._probe_sent = 0
        self._backoff = Backoff()
        self.ticket = Ticket()
        self.call = Call()
        """Runs while the thread is inside the driver."""
        self._opened = False
        """The last try to open the camera went well."""
        self.worked = False
        """A frame was delivered."""
        self.waiting_entry: Entry | None = None
        """The trigger whose frame has not come yet."""

    def run(self) -> None:
        """Grab until told to stop or until a finite source ends; then nothing more is numbered. Raises Revoked."""
        line = self._line
        failures = 0
        while not line.stop.is_set():
            self.camera = self._next_camera() or self.camera
            if line.paused.is_set():
                line.refuse_triggers("the line is paused")
                self._pass_probe()
                line.stop.wait(GRAB_TIMEOUT_S)
                continue
            failed = False
            try:
                self._open()
                failures, self.after_hang = 0, False
                self._grab_while_it_lasts()
            except EndOfStream:
                self._log.info("end of stream")
                self._answer_open_trigger("the stream has ended")
                break
            except CameraError as error:
                self._answer_open_trigger(str(error))
                self._take_what_has_come()
                if not (self.camera.live or isinstance(error, CameraLost)):
                    raise  # files do not come back by themselves
                failures += 1
                if self.after_hang and failures >= _REOPENS_AFTER_HANG:
                    raise
                self._tell_of(error)
                failed = True
            finally:
                # Said before closing, which may take its time with a camera that is gone.
                if not self.ticket.revoked:
                    line.state = replace(line.state, connected=False)
                with self._driver():
                    if not self.ticket.revoked:
                        line.ring.return_loans()
                    self.camera.close()
            if failed:
                self._pause()
        line.end("the line is stopping")

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """Be inside the driver; a generation that was abandoned there does nothing more when it comes back."""
        try:
            with self.call.running():
                yield
        finally:
            if self.ticket.revoked:
                raise Revoked

    def _open(self) -> None:
        self._opened = False
        with self._driver():
            info = self.camera.open()
        self._opened = True
        self._line.ring.reserve(info.frame_bytes, info.lends)
        state = self._line.state
        again = state.source is not None and state.error is not None  # not after a pause or a reload
        self._line.state = CameraState(connected=True, source=info.source, reopened=state.reopened + again)
        described: dict[str, Any] = {"source": info.source, "model": info.model}
        described |= {"width": info.width, "height": info.height}
        if state.error is not None:
            self._events.say(EventKind.CAMERA, "the camera is back", level="info", **described)
        self._log.info("camera open", pixel_format=info.pixel_format, **described)

    def _grab_while_it_lasts(self) -> None:
        line = self._line
        while not (line.stop.is_set() or line.paused.is_set()):
            if self.camera.fires is Fires.ITSELF:
                self._take_all(self._grab())
            else:
                self._trigger_one()
            self._pass_probe()
            if self.camera.fires is not Fires.ON_COMMAND:  # a reload may have changed that meanwhile
                line.refuse_triggers("the camera is not triggered by command any more")
            replacement = self._next_camera()
            if replacement is not None:
                self._take_what_has_come()
                with self._driver():
                    self.camera.close()
                self.camera = replacement
                self._open()
        self._take_what_has_come()

    def _take_what_has_come(self) -> None:
        """Number what a camera has delivered by itself before it is closed, which throws that away."""
        if not self._opened or not self.camera.live or self.camera.fires is not Fires.ITSELF:
            return
        with suppress(CameraError, EndOfStream):  # it is closed in any case
            for _ in range(_DELIVERED_AT_MOST):
                frames = self._grab(0.0)
                if not frames:
                    break
                self._take_all(frames)

    def _grab(self, timeout_s: float = GRAB_TIMEOUT_S) -> list[Frame]:
        with self._driver():
            self._line.ring.return_loans()
            return self.camera.grab(timeout_s)

    def _trigger_one(self) -> None:
        """Fire one trigger, numbered before it is fired, and wait for its frame."""
        line = self._line
        if self.camera.fires is Fires.ON_COMMAND:
            entry = line.triggers.take(GRAB_TIMEOUT_S)
            if entry is None:
                return
            self.waiting_entry = entry
            until_s = max(entry.frame.arrived_ns / 1e9 + _READY_WITHIN_S, time.monotonic() + _ASKED_FOR_S)
            while not entry.is_late() and time.monotonic() < until_s:
                if self._ready() and not entry.is_late():
                    self._fire(entry)
                    return
                self._pass_probe()
                if line.stop.is_set() or line.paused.is_set():
                    self._answer_open_trigger("the line is paused or stopping")
                    return
            self._answer_open_trigger("the camera was not ready for the trigger", Reason.TIMEOUT)
        elif self._ready():
            self._fire(line.ledger.open(self.ticket, Frame(FrameStatus.PENDING, line.state.source or "")))

    def _fire(self, entry: Entry) -> None:
        self.waiting_entry = entry
        with self._driver():
            self.camera.fire()
        while not (frames := self._grab()):
            self._pass_probe()
            if self._line.stop.is_set() and entry.is_late():
                return  # its verdict is out, and nobody waits for its frame
        self.waiting_entry = None
        # Frames that the camera counted and lost come first in the list; the trigger's own is the last.
        self._fill(entry, frames.pop())
        self._take_all(frames)

    def _ready(self) -> bool:
        with self._driver():
            return self.camera.ready(GRAB_TIMEOUT_S)

    def _take_all(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._judge(self._line.ledger.open(self.ticket, frame))

    def _fill(self, entry: Entry, frame: Frame) -> None:
        frame.sequence, frame.arrived_ns = entry.sequence, entry.frame.arrived_ns
        frame.wall_ns = entry.frame.wall_ns
        if self._line.ledger.fill(entry, frame):
            self._judge(entry)
        else:
            self._events.say(EventKind.LATE, "the frame came after its verdict was due", sequence=entry.sequence)

    def _judge(self, entry: Entry) -> None:
        """Send a frame to the engine, or settle it at once when there is nothing to judge."""
        self.worked = True
        self._backoff.succeeded()
        try:
            self._send(entry)
        except BaseException as error:  # it has its number already, and would be nobody's
            failed = Inspection(Outcome.INVALID, Reason.ENGINE, f"{type(error).__name__}: {error}")
            self._line.ledger.settle(entry, failed)
            raise

    def _send(self, entry: Entry) -> None:
        line, frame = self._line, entry.frame
        if frame.status is FrameStatus.COMPLETE and frame.image is not None:
            slot = self._lease()
            if slot is not None:
                try:
                    line.ring.keep(slot, frame)
                except BaseException:
                    line.ring.give_back(slot)
                    raise
                frame.grabbed_ns = time.monotonic_ns()
                line.send(Grabbed(entry, slot))
                return
            frame.image = None
            if self._wait_when_full():
                frame.status, frame.detail = FrameStatus.CAMERA, "the line is stopping"
            else:
                frame.status = FrameStatus.OVERLOAD
                frame.detail = "every slot was taken; the engine is slower than the camera"
        frame.grabbed_ns = time.monotonic_ns()
        inspection = Inspection(Outcome.INVALID, Reason(frame.status.value), frame.detail)
        line.ledger.settle(entry, inspection)
        self._log.warning(
            "invalid", sequence=entry.sequence, reason=inspection.reason, detail=frame.detail, source=frame.source
        )

    def _lease(self) -> Slot | None:
        if not self._wait_when_full():
            return self._line.ring.lease(0)
        stopped_s: float | None = None
        while (slot := self._line.ring.lease(GRAB_TIMEOUT_S)) is None:
            if self.ticket.revoked:
                raise Revoked
            if self._line.stop.is_set():
                stopped_s = stopped_s or time.monotonic()
                if time.monotonic() - stopped_s > _WAITS_WHILE_STOPPING_S:
                    return None
            self._pass_probe()
        return slot

    def _pass_probe(self) -> None:
        wanted = self._line.probe_wanted
        if wanted > self._probe_sent:
            self._probe_sent = wanted
            self._line.send(Probe(wanted))

    def _answer_open_trigger(self, why: str, reason: Reason = Reason.CAMERA) -> None:
        entry, self.waiting_entry = self.waiting_entry, None
        if entry is not None:
            self._line.ledger.settle(entry, Inspection(Outcome.INVALID, reason, why))

    def _tell_of(self, error: CameraError) -> None:
        if self._line.state.error != str(error):  # said once, not at every try
            self._events.say(EventKind.CAMERA, "the camera failed", error=str(error))
        self._line.state = replace(self._line.state, error=str(error))

    def _pause(self) -> None:
        line, pause_s = self._line, self._backoff.pause_s()
        self._log.info("camera will be reopened", in_s=round(pause_s, 3))
        deadline_s = time.monotonic() + pause_s
        while (left_s := deadline_s - time.monotonic()) > 0 and not line.paused.is_set():
            line.refuse_triggers(line.state.error or "the camera is away")
            self._pass_probe()
            if line.stop.wait(min(left_s, GRAB_TIMEOUT_S)):
                return
