"""What flows between the threads, and how a thread's failure reaches the supervisor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from daemon.ring import Slot
from drivers.frame import Frame
from pipeline.inspect import Inspection

T = TypeVar("T")
_LOOK_UP_S = 0.2
"""How often a blocked thread looks whether the station is being torn down."""


@dataclass(frozen=True, slots=True)
class Grabbed:
    """A numbered frame on its way to the engine."""

    frame: Frame
    slot: Slot | None
    """Where its image lies; None without an image."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A frame with its inspection on its way to the publisher."""

    frame: Frame
    inspection: Inspection
    judging_began_ns: int
    """Host monotonic clock; 0 for a frame of an earlier run."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Passes through every thread to show that none is stuck."""

    number: int


@dataclass(frozen=True, slots=True)
class End:
    """Nothing comes after this."""


class Torn(Exception):
    """Another thread has failed; this one ends too."""


class Channel(Generic[T]):
    """A bounded queue. A full one makes its writer wait: nothing that was numbered is ever dropped."""

    def __init__(self, capacity: int, torn: threading.Event) -> None:
        self._queue: queue.Queue[T] = queue.Queue(capacity)
        self._torn = torn

    def put(self, item: T) -> None:
        """Append, waiting while full. Raises Torn."""
        while True:
            try:
                return self._queue.put(item, timeout=_LOOK_UP_S)
            except queue.Full:
                if self._torn.is_set():
                    raise Torn from None

    def try_put(self, item: T) -> bool:
        """Append without waiting; return whether there was room."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            return False
        return True

    def get(self) -> T:
        """Take the oldest, waiting while empty. Raises Torn."""
        while True:
            try:
                return self._queue.get(timeout=_LOOK_UP_S)
            except queue.Empty:
                if self._torn.is_set():
                    raise Torn from None


class Worker(threading.Thread):
    """A thread whose failure is never lost: it is kept, and everyone else is told to stop."""

    def __init__(self, name: str, work: Callable[[], None], torn: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._torn = torn
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Do the work; the supervisor reads `failure` afterwards."""
        try:
            self._work()
        except Torn:
            return
        except BaseException as error:  # noqa: BLE001 - handed to the supervisor, which ends the process
            self.failure = error
            self._torn.set()
