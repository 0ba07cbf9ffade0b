"""The thread that tells the reject gate by wire that a part may pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from daemon.events import EventKind, Events
from daemon.supervision import Call
from drivers.camera import CameraError

_GAP_S = 0.01
"""Between two pulses at least: longer than a PLC's input filter."""
_TOO_OLD_NS = 100_000_000
"""A pulse that could not be given for so long would pass another part than its own, whatever the deadline."""


class Passing:
    """Gives one pulse for each OK; a part whose pulse would meet the one before it gets none, which is said.

    A pulse that followed another at once would look like one long pulse to the PLC.
    """

    def __init__(self, signal_pass: Callable[[int], None], events: Events) -> None:
        self._signal_pass = signal_pass
        self._events = events
        self._changed = threading.Condition()
        self._waiting: tuple[int, int] | None = None
        self._busy = False
        """A pulse is asked for or being given."""
        self._ended = False
        self.worked = False
        """A pulse was given."""
        self.call = Call()
        """Runs while the thread is inside the driver."""

    def passed(self, sequence: int, due_ns: int | None) -> None:
        """Ask for a pulse, which begins before the deadline's end or not at all: then another part stands there.

        Never waits.

        Args:
            sequence: of the part.
            due_ns: when its deadline ends (`time.monotonic_ns`); None: it has none.
        """
        now_ns = time.monotonic_ns()
        until_ns = now_ns + _TOO_OLD_NS
        if due_ns is not None:
            if now_ns > due_ns:
                self.refuse(sequence, "the verdict was late")
                return
            until_ns = min(until_ns, due_ns)
        with self._changed:
            why = "the daemon is ending" if self._ended else "the pulse before it is not over"
            given = not (self._ended or self._busy)
            if given:
                self._busy, self._waiting = True, (sequence, until_ns)
                self._changed.notify()
        if not given:
            self.refuse(sequence, why)

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
            try:
                self._give(*waiting)
                time.sleep(_GAP_S)
            finally:
                with self._changed:
                    self._busy = False

    def _give(self, sequence: int, until_ns: int) -> None:
        if time.monotonic_ns() > until_ns:
            self.refuse(sequence, "it came too late")
            return
        try:
            with self.call.running():
                self._signal_pass(until_ns)
            self.worked = True
        except CameraError as error:
            self.refuse(sequence, str(error))

    def refuse(self, sequence: int, why: str) -> None:
        """Say that an OK part gets no pulse."""
        self._events.say(EventKind.CAMERA, "an OK part got no pass pulse", sequence=sequence, error=why)
