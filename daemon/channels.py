"""What flows from acquisition to the engine, and the channel that it flows through."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from daemon.ledger import Entry
from daemon.ring import Slot
from pipeline.inspect import Inspector

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Grabbed:
    """A numbered frame with an image, on its way to the engine."""

    entry: Entry
    slot: Slot


@dataclass(frozen=True, slots=True)
class Probe:
    """Passes through every thread to show that none is stuck."""

    number: int


@dataclass(frozen=True, slots=True)
class Swap:
    """Judge what follows with another inspector."""

    inspector: Inspector
    done: Future[None] = field(default_factory=Future)


class Closed(Exception):
    """This generation of a worker or a channel has ended; whoever still holds it must end too."""


class Channel(Generic[T]):
    """A bounded queue for one generation of its reader. A full one makes its writer wait.

    `close` fences and drains in one step: what was put in before is returned, what comes after is refused.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def peek(self) -> T | None:
        """Return what `get` would, and leave it there; None while that would wait."""
        with self._changed:
            return self._items[0] if self._items else None

    def put(self, item: T) -> None:
        """Append, waiting while full. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the oldest, waiting while empty. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if self._closed:
                raise Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> list[T]:
        """End this generation; return what nobody took."""
        with self._changed:
            left, self._closed = list(self._items), True
            self._items.clear()
            self._changed.notify_all()
            return left
