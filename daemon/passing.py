"""The thread that tells the reject gate by wire that a part may pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from daemon.events import EventKind, Events
from daemon.supervision import Call
from drivers.camera import CameraError

_TOO_OLD_NS = 100_000_000
"""A pulse that could not be given for so long would pass another part than its own."""


class Passing:
    """Gives one pulse for each OK; the newest waits while another is given, an older one is dropped and said."""

    def __init__(self, signal_pass: Callable[[], None], events: Events) -> None:
        self._signal_pass = signal_pass
        self._events = events
        self._changed = threading.Condition()
        self._waiting: tuple[int, int] | None = None
        self._ended = False
        self.call = Call()
        """Runs while the thread is inside the driver."""

    def passed(self, sequence: int, late: bool) -> None:
        """Ask for a pulse, unless the verdict was late: another part stands there now. Never waits."""
        if late:
            self._not_given(sequence, "the verdict was late")
            return
        with self._changed:
            ended, lost = self._ended, self._waiting
            if not ended:
                self._waiting = (sequence, time.monotonic_ns())
                self._changed.notify()
        if ended:
            self._not_given(sequence, "the daemon is ending")
            return
        if lost is not None:
            self._not_given(lost[0], "the pulse before it was not over")

    def end(self) -> None:
        """Let `run` end."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def run(self) -> None:
        """Give pulses until `end`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._ended)
                waiting, self._waiting = self._waiting, None
            if waiting is None:
                return
            sequence, asked_ns = waiting
            if time.monotonic_ns() - asked_ns > _TOO_OLD_NS:
                self._not_given(sequence, "it came too late")
                continue
            try:
                with self.call.running():
                    self._signal_pass()
            except CameraError as error:
                self._not_given(sequence, str(error))

    def _not_given(self, sequence: int, why: str) -> None:
        self._events.say(EventKind.CAMERA, "an OK part got no pass pulse", sequence=sequence, error=why)
