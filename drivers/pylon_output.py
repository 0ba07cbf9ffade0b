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

from drivers.camera import CameraError, CameraLost, Options

_SIGNAL = "SoftwareSignal1"
_AGAIN_S = 0.01
"""Between two tries to switch a line off."""


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

    stuck: Exception | None = None
    """Why the line could not be switched off: until it is, whatever comes would pass, and so nothing may."""

    def __init__(self, camera: Any, options: PassOutput, *, inverter_configured: bool) -> None:
        """Set the line up, switched off.

        Raises GenericException for what the camera refuses, and CameraError where the line is inverted, unless that
        is what was configured.
        """
        self._camera, self._options = camera, options
        self._in_use = threading.Lock()
        self._closed = False
        from pypylon import genicam

        self._genicam = genicam
        self.timed_by_camera = self._has("SoftwareSignalPulse")
        camera.LineSelector.Value = options.line
        camera.LineMode.Value = "Output"
        if not inverter_configured and self._has("LineInverter") and camera.LineInverter.Value:
            raise CameraError(
                f"pass_output: the camera inverts {options.line}, which would pass whenever there is no pulse; "
                f"set features: {{LineSelector: {options.line}, LineInverter: false}}, or true if it is wired so"
            )
        if self.timed_by_camera:
            camera.TimerSelector.Value = "Timer1"
            camera.TimerTriggerSource.Value = _SIGNAL
            camera.TimerDuration.Value = options.pulse_ms * 1000
            if self._has("TimerDelay") and camera.TimerDelay.Value:
                camera.TimerDelay.Value = 0
            camera.SoftwareSignalSelector.Value = _SIGNAL
            camera.LineSource.Value = "Timer1Active"
        else:
            camera.UserOutputSelector.Value = options.user_output
            self._set(False)
            camera.LineSource.Value = options.user_output

    def pulse(self, until_ns: int) -> None:
        """Energise the line for its pulse; returns when it is over.

        Raises CameraLost where the camera was closed before its end, or does not begin it before `until_ns`
        (`time.monotonic_ns`), and GenericException for what it refuses.
        """
        failed: Exception | None = None
        with self._using(until_ns):
            _check_in_time(until_ns)
            if self.stuck is not None:
                raise CameraLost("the output line cannot be switched off")
            try:
                if self.timed_by_camera:
                    self._camera.SoftwareSignalPulse.Execute()
                else:
                    self._set(True)
                _check_in_time(until_ns)
            except (CameraLost, self._genicam.GenericException) as error:
                failed = error  # it may be energised all the same
        if self.timed_by_camera or failed is None:
            time.sleep(self._options.pulse_ms / 1000)
        if not self.timed_by_camera:
            self._end_pulse()
        if failed is not None:
            raise failed

    def _end_pulse(self) -> None:
        """Switch off, again and again until the camera does it or is closed."""
        while True:
            with self._using():
                try:
                    self._set(False)
                except self._genicam.GenericException as error:
                    self.stuck = error
                else:
                    self.stuck = None
                    return
            time.sleep(_AGAIN_S)

    def close(self) -> None:
        """Switch the line off and leave the camera alone from now on. Raises GenericException where it is gone."""
        with self._using():
            self._closed = True
            if not self.timed_by_camera:
                self._set(False)

    @contextlib.contextmanager
    def _using(self, until_ns: int | None = None) -> Iterator[None]:
        wait_s = -1 if until_ns is None else max(0, until_ns - time.monotonic_ns()) / 1e9
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

    def _has(self, name: str) -> bool:
        node = self._camera.GetNodeMap().GetNode(name)
        return node is not None and self._genicam.IsImplemented(node)


def _check_in_time(until_ns: int) -> None:
    if time.monotonic_ns() > until_ns:
        raise CameraLost("the output line answered too late")
