"""A pulse on a Basler camera's output line for each part that may pass: energise-to-pass.

Cable break, power loss, a dead daemon and every verdict but OK all look the same to the PLC: no pulse, reject.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from drivers.camera import CameraLost, Options

_SIGNAL = "SoftwareSignal1"
_TOO_LATE_S = 0.1
"""A line that is energised so long after it was asked to would pass another part."""


class PassOutput(Options):
    """Which line is energised for a part that is OK, and how long."""

    line: str = Field(default="Line2", description="an output line of the camera")
    user_output: str = "UserOutput1"
    pulse_ms: float = Field(default=50, gt=0, le=10_000)


class PassLine:
    """The output line of one open camera: one thread gives its pulses, the one that grabs closes it.

    The SDK ends the process when a feature of a destroyed device is touched, so nothing is after `close`.

    Where the camera has software signals, its own timer ends the pulse, so that it cannot stay on whatever happens
    to this process. Elsewhere this process ends it: killed within a pulse, it leaves the line on until the
    daemon is back and has switched it off.
    """

    def __init__(self, camera: Any, options: PassOutput) -> None:
        """Set the line up, switched off. Raises GenericException for what the camera refuses."""
        self._camera, self._options = camera, options
        self._in_use = threading.Lock()
        self._closed = False
        from pypylon import genicam

        signal = camera.GetNodeMap().GetNode("SoftwareSignalPulse")
        self.timed_by_camera = signal is not None and genicam.IsImplemented(signal)
        camera.LineSelector.Value = options.line
        camera.LineMode.Value = "Output"
        if self.timed_by_camera:
            camera.TimerSelector.Value = "Timer1"
            camera.TimerTriggerSource.Value = _SIGNAL
            camera.TimerDuration.Value = options.pulse_ms * 1000
            camera.SoftwareSignalSelector.Value = _SIGNAL
            camera.LineSource.Value = "Timer1Active"
        else:
            camera.UserOutputSelector.Value = options.user_output
            self._set(False)
            camera.LineSource.Value = options.user_output

    def pulse(self) -> None:
        """Energise the line for its pulse; returns when it is over.

        Raises CameraLost where the camera was closed before its end, or does not answer in time.
        """
        asked_s = time.monotonic()
        if self.timed_by_camera:
            with self._using(_TOO_LATE_S):
                self._camera.SoftwareSignalPulse.Execute()
            time.sleep(self._options.pulse_ms / 1000)
            return
        with self._using(_TOO_LATE_S):
            try:
                self._set(True)
                if time.monotonic() - asked_s > _TOO_LATE_S:
                    raise CameraLost("the output line answered too late")
            except BaseException:
                self._set(False)
                raise
        try:
            time.sleep(self._options.pulse_ms / 1000)
        finally:
            with self._using():
                self._set(False)

    def close(self) -> None:
        """Switch the line off and leave the camera alone from now on. Raises GenericException where it is gone."""
        with self._using():
            self._closed = True
            if not self.timed_by_camera:
                self._set(False)

    @contextlib.contextmanager
    def _using(self, wait_s: float = -1) -> Iterator[None]:
        if not self._in_use.acquire(timeout=wait_s):
            raise CameraLost("the output line does not answer")
        try:
            if self._closed:
                raise CameraLost("the camera was closed")
            yield
        finally:
            self._in_use.release()

    def _set(self, on: bool) -> None:
        self._camera.UserOutputValue.Value = on
