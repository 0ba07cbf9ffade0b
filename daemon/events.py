"""Events: what an operator should hear of beside the verdicts. Counted, logged and published."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from enum import StrEnum
from typing import Any

import msgspec
import structlog

from daemon.messages import EVENT_SCHEMA, EventMessage, rfc3339

_WAITING = 1000
"""Messages that may wait for the publisher; the oldest make room: events stand in the log, too."""


class EventKind(StrEnum):
    """Words of the `event` field."""

    ALARM = "alarm"
    """So many rejects in a row: more often the lamp or the camera than the parts."""
    LATE = "late"
    """A result that came after its number's verdict had gone out."""
    CAMERA = "camera"
    """The camera was lost or is back."""
    WORKER = "worker"
    """A thread failed or hung, and is followed by another."""
    JOURNAL = "journal"
    """The journal cannot take verdicts in time, or can again."""
    IMAGES = "images"
    """Images cannot be kept, or can again."""
    STATE = "state"
    """The numbers cannot be copied into the state folder, or can again."""
    RELOAD = "reload"
    """A new configuration was taken or refused."""
    CONTROL = "control"
    """Somebody paused, resumed or stopped the line."""
    INVARIANT = "invariant"
    """seen = ok + ng + invalid + in_flight does not hold: a fault of ours."""


class Outbox:
    """Messages other than verdicts on their way to the publisher; never makes anyone wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[str, msgspec.Struct]] = deque(maxlen=_WAITING)

    def put(self, topic: str, message: msgspec.Struct) -> None:
        """Append a message for `topic/STATION/`."""
        with self._lock:
            self._messages.append((topic, message))

    def take(self) -> list[tuple[str, msgspec.Struct]]:
        """Take everything that waits."""
        with self._lock:
            taken = list(self._messages)
            self._messages.clear()
            return taken


class Events:
    """Where every part of the station says what happened."""

    def __init__(self, station: str, boot: str, outbox: Outbox, log: structlog.typing.FilteringBoundLogger) -> None:
        self._station, self._boot = station, boot
        self._outbox = outbox
        self._log = log
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def say(
        self,
        kind: EventKind,
        message: str,
        *,
        level: str = "warning",
        sequence: int | None = None,
        exc_info: BaseException | None = None,
        **data: Any,
    ) -> None:
        """Count, log and publish one event. Safe in any thread."""
        with self._lock:
            self._counts[kind.value] += 1
        logged = {key: value for key, value in {"sequence": sequence, **data}.items() if value is not None}
        if exc_info is not None:
            logged["exc_info"] = exc_info
        getattr(self._log, level)(message, kind=kind.value, **logged)
        described = EventMessage(
            schema=EVENT_SCHEMA,
            station=self._station,
            boot=self._boot,
            time=rfc3339(time.time_ns()),
            event=kind.value,
            level=level,
            message=message,
            sequence=sequence,
            data=data,
        )
        self._outbox.put("event", described)

    def counts(self) -> dict[str, int]:
        """Return how many events of each kind there were."""
        with self._lock:
            return dict(self._counts)
