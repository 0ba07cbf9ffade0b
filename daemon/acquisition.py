"""The acquisition thread: open the camera, number every frame, reopen when it is lost."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import structlog

from daemon.channels import Channel, End, Grabbed, Probe, Torn
from daemon.ring import FrameRing, Slot
from daemon.sequence import SequenceFile
from daemon.tally import Tally
from drivers.camera import Camera, CameraError, EndOfStream
from drivers.frame import Frame, FrameStatus

_GRAB_TIMEOUT_S = 0.1
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 5.0


@dataclass(frozen=True, slots=True)
class CameraState:
    """What is known of the camera, for health messages."""

    connected: bool = False
    source: str | None = None
    reopened: int = 0
    error: str | None = None


class Acquisition:
    """Turn a camera into a stream of numbered frames."""

    def __init__(
        self,
        camera: Camera,
        sequences: SequenceFile,
        ring: FrameRing,
        out: Channel[Grabbed | Probe | End],
        tally: Tally,
        *,
        wait_when_full: bool,
        stop: threading.Event,
        torn: threading.Event,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._camera = camera
        self._sequences = sequences
        self._ring = ring
        self._out = out
        self._tally = tally
        self._wait_when_full = wait_when_full
        self._stop = stop
        self._torn = torn
        self._log = log
        self._probe_wanted = 0
        self._probe_sent = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self.state = CameraState()

    def send_probe(self, number: int) -> None:
        """Ask for a probe to be sent down the line; called by the supervisor."""
        self._probe_wanted = number

    def run(self) -> None:
        """Grab until told to stop or until a finite source ends, then say End."""
        while not self._stop.is_set():
            try:
                info = self._camera.open()
                reopened = self.state.reopened + (self.state.source is not None)
                self.state = CameraState(connected=True, source=info.source, reopened=reopened)
                self._log.info(
                    "camera open",
                    source=info.source,
                    model=info.model,
                    width=info.width,
                    height=info.height,
                    pixel_format=info.pixel_format,
                )
                self._grab_while_it_lasts()
            except EndOfStream:
                self._log.info("end of stream")
                break
            except CameraError as error:
                if not self._camera.live:
                    raise  # files do not come back by themselves
                self._camera_failed(error)
            finally:
                self._camera.close()
                self.state = replace(self.state, connected=False)
        self._out.put(End())

    def _grab_while_it_lasts(self) -> None:
        while not self._stop.is_set():
            frames = self._camera.grab(_GRAB_TIMEOUT_S)
            for frame in frames:
                self._take(frame)
                self._backoff_s = _FIRST_BACKOFF_S
            self._pass_probe()

    def _take(self, frame: Frame) -> None:
        frame.sequence = self._sequences.next()
        self._tally.saw()
        slot: Slot | None = None
        if frame.status is FrameStatus.COMPLETE and frame.image is not None:
            slot = self._lease()
            if slot is None:
                frame.status = FrameStatus.OVERLOAD
                frame.detail = "every slot was taken; the engine is slower than the camera"
                frame.image = None
            else:
                frame.image = slot.store(frame.image)
        frame.grabbed_ns = time.monotonic_ns()
        self._out.put(Grabbed(frame, slot))

    def _lease(self) -> Slot | None:
        if not self._wait_when_full:
            return self._ring.lease(0)
        while (slot := self._ring.lease(_GRAB_TIMEOUT_S)) is None:
            if self._torn.is_set():
                raise Torn
            self._pass_probe()
        return slot

    def _pass_probe(self) -> None:
        if self._probe_wanted > self._probe_sent:
            self._probe_sent = self._probe_wanted
            self._out.put(Probe(self._probe_sent))

    def _camera_failed(self, error: CameraError) -> None:
        self.state = replace(self.state, connected=False, error=str(error))
        self._log.warning("camera failed", error=str(error), reopen_in_s=round(self._backoff_s, 3))
        self._camera.close()
        deadline_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _LONGEST_BACKOFF_S)
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._pass_probe()
            if self._stop.wait(min(left_s, _GRAB_TIMEOUT_S)):
                return
